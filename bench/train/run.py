"""Measures a shape, writes the result as JSON, prints a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from prism_fast.bench.ops.machine import machine
from prism_fast.bench.step.measure import TOLERANCE
from prism_fast.bench.step.work import Shape, draw_weights, widths

from .measure import Row, measure


def run(
    shape: Shape,
    *,
    device: str,
    depth: int | None,
    dtype: torch.dtype,
    rounds: int = 3,
    out: Path | None = None,
    show: Callable[[str], object] = print,
) -> list[Row]:
    """``depth``: layers of the real widths, None for the tiny policy."""
    about, name = machine(), str(dtype).removeprefix("torch.")
    options = {"device": device, "depth": depth, "dtype": name, "tolerance": TOLERANCE}
    show(", ".join(f"{name} {value}" for name, value in (about | options).items() if value is not None))
    sizes = widths(depth)
    rows = measure(shape, sizes, draw_weights(sizes, device), device=device, dtype=dtype, rounds=rounds)
    for line in ("", *table(rows)):
        show(line)
    if out is not None:
        result = {"machine": about, **options, "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(result, indent=1) + "\n")
    return rows


def table(rows: list[Row]) -> list[str]:
    """Per column: median time of an update, response tokens per second, ratio to TRL, memory, loss, difference."""
    first = rows[0]
    head = f"prompt {first.prompt}, response {first.response}, {first.rollouts} rollouts"
    lines = [f"{head:<48}{'ms':>10}{'tokens/s':>12}{'TRL/it':>9}{'MiB':>9}{'loss':>12}   difference"]
    for row in rows:
        if row.status != "ok" or row.ms_p50 is None:
            lines.append(f"  {row.column:<46}{row.status}: {row.note}")
            continue
        ratio = f"{row.of_trl:9.2f}" if row.of_trl is not None else " " * 9
        memory = f"{row.peak_mib:9.0f}" if row.peak_mib is not None else " " * 9
        lines.append(
            f"  {row.column:<46}{row.ms_p50:10.1f}{row.response_tokens_per_second:12.0f}{ratio}{memory}"
            f"{row.loss:12.6f}   {max(row.errors.values()):.1e}"
        )
    return lines
