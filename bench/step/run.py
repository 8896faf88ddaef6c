"""Measures every shape, writes the result as JSON, prints a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from prism_fast.bench.ops.machine import machine

from .column import PHASES
from .measure import TOLERANCE, Row, measure
from .work import Shape, draw_weights, widths


def run(
    shapes: Sequence[Shape],
    *,
    device: str,
    depth: int | None,
    dtype: torch.dtype,
    checkpointing: bool = False,
    rounds: int = 3,
    out: Path | None = None,
    show: Callable[[str], object] = print,
) -> list[Row]:
    """``depth``: layers of the real widths, None for the tiny models. The file is written anew after every shape."""
    about = machine()
    options = {
        "device": device,
        "depth": depth,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_checkpointing": checkpointing,
        "tolerance": TOLERANCE,
    }
    show(", ".join(f"{name} {value}" for name, value in (about | options).items() if value is not None))
    rows: list[Row] = []
    sizes = widths(depth)
    weights = draw_weights(sizes, device)
    for shape in shapes:
        found = measure(shape, sizes, weights, device=device, dtype=dtype, checkpointing=checkpointing, rounds=rounds)
        rows += found
        show("")
        for line in table(found):
            show(line)
        if out is not None:
            result = {"machine": about, **options, "rows": [asdict(row) for row in rows]}
            out.write_text(json.dumps(result, indent=1) + "\n")
    return rows


def table(rows: list[Row]) -> list[str]:
    """Per column: median times of the phases, ratios to the published schedule, tokens, images, FLOP, memory, error."""
    first = rows[0]
    head = f"prompt {first.prompt}, response {first.response}, teacher {first.teacher}, {first.rollouts} rollouts"
    times = "".join(f"{name:>15}" for name in (*PHASES, "step ms"))
    lines = [f"{head:<56}{times}   stock/it  kernels/it  D tokens  policy tokens  images   TFLOP      MiB   error"]
    for row in rows:
        error = max(row.errors.values(), default=float("nan"))
        if row.status != "ok" or not row.runs:
            lines.append(f"  {row.column:<54}{row.status}: {row.note}")
            continue
        spent = "".join(f"{row.ms_p50[name]:15.1f}" for name in (*PHASES, "step"))
        ratios = "".join(
            f"{value:>{width}.2f}" if value is not None else " " * width
            for value, width in ((row.of_stock, 11), (row.of_kernels, 12))
        )
        discriminator = _total(row, ("score", "discriminator"), "tokens")
        policy = _total(row, ("policy",), "tokens")
        images = _total(row, PHASES, "images")
        flop = sum(count["flop"] for count in row.counts.values()) / 1e12
        peak = f"{row.peak_mib:9.0f}" if row.peak_mib is not None else " " * 9
        lines.append(
            f"  {row.column:<54}{spent}{ratios}{discriminator:10.0f}{policy:15.0f}{images:8.0f}{flop:8.3f}{peak}"
            f"  {error:.1e}"
        )
    return lines


def _total(row: Row, phases: Sequence[str], name: str) -> float:
    return sum(row.counts[p][name] + row.counts[p][f"{name}_no_grad"] for p in phases)
