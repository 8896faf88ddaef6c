"""Compares the columns of one shape, then times them; they take turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from prism_fast.bench.ops.measure import percentiles
from prism_fast.bench.ops.op import Absent
from prism_fast.bench.step.measure import TOLERANCE, peak, rank, relative, synchronise, taken, worst
from prism_fast.bench.step.work import Shape, Weights, Widths, build, draw

from .columns import FUSED, OURS, TRL, Column, Host, Ours

NAMES = (TRL, FUSED, OURS)
STATUSES = ("ok", "wrong", "oom", "absent")


@dataclass
class Row:
    """One column of one shape. Times of an update in milliseconds; ``response_tokens_per_second`` counts the tokens of
    the responses alone, so that columns that compute a prompt more often are not credited for it; ``peak_mib``: memory
    beyond weights and optimizer states; ``of_trl``: TRL's time divided by this column's, the median over the rounds.
    ``errors``: differences from the first column, of the loss and of the worst parameter's gradient."""

    column: str
    prompt: int
    response: int
    rollouts: int
    status: str
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    runs: int = 0
    response_tokens_per_second: float | None = None
    of_trl: float | None = None
    peak_mib: float | None = None
    loss: float | None = None


def measure(
    shape: Shape, sizes: Widths, weights: Weights, *, device: str, dtype: torch.dtype, rounds: int
) -> list[Row]:
    """Compares in float32 and times in ``dtype``, without wrong columns; ``rounds=0`` times nothing."""
    rows = {name: Row(name, shape.prompt, shape.response, shape.rollouts, "ok") for name in NAMES}
    found = _columns(shape, sizes, weights, torch.float32, rows)
    _compare(found, rows)
    if dtype != torch.float32:
        found = _columns(shape, sizes, weights, dtype, rows)
    found = {name: column for name, column in found.items() if rows[name].status == "ok"}
    for name in list(found):
        try:
            found[name].update()
            rows[name].peak_mib = peak(found[name].update, device)
        except torch.OutOfMemoryError as error:
            rows[name].status, rows[name].note = "oom", str(error).splitlines()[0]
            found.pop(name).engine.discard()
    spent: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, column in found.items():
            synchronise(device)
            start = time.perf_counter()
            column.update()
            synchronise(device)
            spent[name].append((time.perf_counter() - start) * 1e3)
    for name, times in spent.items() if rounds else ():
        _fill(rows[name], times, spent.get(TRL), shape)
    return list(rows.values())


def _columns(
    shape: Shape, sizes: Widths, weights: Weights, dtype: torch.dtype, rows: dict[str, Row]
) -> dict[str, Column]:
    work, found = draw(shape, sizes), {}
    for name in NAMES:
        policy = build(sizes, weights, stock=name != OURS, dtype=dtype, checkpointing=False).policy
        try:
            found[name] = Ours(policy, work) if name == OURS else Host(policy, work, fused=name == FUSED)
        except Absent as error:
            rows[name].status, rows[name].note = "absent", str(error)
    return found


def _compare(found: dict[str, Column], rows: dict[str, Row]) -> None:
    """One update of every column: its loss, and its differences from the first."""
    first, gradients = None, {}
    for name, column in found.items():
        column.engine.keep = True
        column.update()
        column.engine.keep = False
        mine = {f"d_policy.{key}": value for key, value in taken(column.engine).items()}
        row, row.loss = rows[name], column.loss
        if first is None:
            first, gradients = column.loss, mine
        row.errors = {"loss": relative(column.loss, first), **worst(mine, gradients, ["d_policy"])}
        largest = max(row.errors, key=lambda key: rank(row.errors[key]))
        if not row.errors[largest] <= TOLERANCE:  # NaN is wrong
            row.status, row.note = "wrong", f"{largest} is off by {row.errors[largest]:.1e}, allowed {TOLERANCE:.0e}"


def _fill(row: Row, times: list[float], rival: list[float] | None, shape: Shape) -> None:
    row.runs = len(times)
    row.ms_p20, row.ms_p50, row.ms_p80 = percentiles(times if len(times) > 1 else times * 2)
    row.response_tokens_per_second = shape.rollouts * shape.response / row.ms_p50 * 1e3
    if rival is not None:
        row.of_trl = statistics.median(theirs / mine for theirs, mine in zip(rival, times, strict=True))
