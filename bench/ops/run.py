"""Runs the chosen ops, writes the result as JSON, prints a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .machine import machine
from .measure import measure, measured_ceiling
from .memory import peak_on_cpu
from .op import MODES, Op, Row
from .providers import providers as providers_table
from .short import of_plain_attention
from .suite import OPS


class NothingToDo(ValueError):
    """No op or provider has the asked name, or no shape of an op has the asked number of sizes."""


def run(
    *,
    device: str,
    size: str,
    ops: Sequence[str] = (),
    providers: Sequence[str] = (),
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    seconds: float = 3.0,
    memory: bool = False,
    out: Path | None = None,
    show: Callable[[str], object] = print,
) -> list[Row]:
    """``size``: "cuda", "cpu" or "small", a key of an op's shapes. Raises NothingToDo, which lists the known names."""
    chosen = select(ops, shape, size)
    known = {name for op in chosen for name in op.providers}
    if providers and not any(part in name for part in providers for name in known):
        raise NothingToDo(f"no provider named {', '.join(providers)}; there are {', '.join(sorted(known))}")
    plan = [
        (op, s, d)
        for op in chosen
        for s in ((shape,) if shape else op.shapes[size])
        for d in ((dtype,) if dtype else op.dtypes[device])
    ]
    ceiling = measured_ceiling(device, {d for op, _, d in plan if op.unit == "TFLOP/s"})
    about = machine()
    show(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    show("ceiling: " + ", ".join(f"{value:.4g} {name}" for name, value in ceiling.items()))
    rows: list[Row] = []
    for op, s, d in plan:
        found = measure(
            op, s, d, device, seconds=seconds, ceiling=ceiling,
            only=lambda name: not providers or any(part in name for part in providers),
        )  # fmt: skip
        if memory and device == "cpu":
            _add_memory(found, op, s, d)
        rows += found
        show("")
        for line in table(found):
            show(line)
        if out is not None:
            result = {"machine": about, "size": size, "ceiling": ceiling, "rows": [asdict(row) for row in rows]}
            out.write_text(json.dumps(result, indent=1) + "\n")
    for line in of_plain_attention([asdict(row) for row in rows]):
        show(line)
    for line in ("", *providers_table(rows)):
        show(line)
    return rows


def select(ops: Sequence[str], shape: tuple[int, ...] | None, size: str) -> list[Op]:
    chosen = [op for op in OPS.values() if not ops or any(part in op.name for part in ops)]
    if not chosen:
        raise NothingToDo(f"no op named {', '.join(ops)}; there are {', '.join(OPS)}")
    wrong = [op.name for op in chosen if shape is not None and len(op.shapes[size][0]) != len(shape)]
    if wrong:
        raise NothingToDo(
            f"a shape of {len(shape or ())} sizes does not fit {', '.join(wrong)}; choose one op with --op"
        )
    return chosen


def _add_memory(rows: list[Row], op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name in {row.provider for row in rows if row.status == "ok"}:
        peak = peak_on_cpu(op.name, name, shape, dtype)
        for row in rows:
            if row.provider == name:
                row.peak_mib = peak


def table(rows: list[Row]) -> list[str]:
    """One line per provider: median times of the modes, rate of the whole, memory, error."""
    first = rows[0]
    head = f"{first.op}  {first.shape}  {first.dtype}"
    lines = [
        f"{head:<56}{'no grad':>10}{'forward':>10}{'backward':>10}{'full ms':>10}   rate     of ceiling   MiB  error"
    ]
    for name in dict.fromkeys(row.provider for row in rows):
        modes = {row.mode: row for row in rows if row.provider == name}
        full = modes["full"]
        if full.ms_p50 is None:
            lines.append(f"  {name:<34}{full.status}: {full.note[:110]}")
            continue
        times = "".join(f"{modes[mode].ms_p50:10.3f}" if mode in modes else f"{'-':>10}" for mode in MODES)
        share = f"{full.ceiling_percent:5.1f} %" if full.ceiling_percent is not None else "      -"
        peak = f"{full.peak_mib:8.1f}" if full.peak_mib is not None else "       -"
        lines.append(f"  {name:<54}{times} {full.rate:8.4g} {full.unit:<8}{share} {peak}  {full.error:.1e}")
    return lines
