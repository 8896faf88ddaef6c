"""Compares the columns of one shape, then times them; they take turns."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .column import PHASES, Column
from .counting import counted
from .ours import Ours
from .published import Published
from .work import Shape, Weights, Widths, Work, build, draw, with_logprobs

STOCK, KERNELS, OURS = "published, stock kernels", "published, our kernels", "prism_fast"
STATUSES = ("ok", "wrong", "oom")
# Largest difference from the first column in float32: relative for the scores, every parameter's gradient (a tiny one
# relative to a thousandth of the largest) and losses above 1, in nats for the log-probs. A token at a near-tie may go
# to another expert, which changes that expert's gradient by the token's share.
TOLERANCE = 1e-3
SMALL = 1e-3
WARM_UP = 1


@dataclass
class Row:
    """One column of one shape. Times in milliseconds per phase (and ``step``), counts per phase, memory of a step
    beyond weights and optimizer states. ``of_stock`` and ``of_kernels``: time of the published schedule with stock and
    with our kernels divided by this column's, the median over the rounds."""

    column: str
    prompt: int
    response: int
    teacher: int
    rollouts: int
    status: str
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    ms_p20: dict[str, float] = field(default_factory=dict)
    ms_p50: dict[str, float] = field(default_factory=dict)
    ms_p80: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    of_stock: float | None = None
    of_kernels: float | None = None
    peak_mib: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)  # of every timed step, an optimizer update each


def columns(
    work: Work, sizes: Widths, weights: Weights, *, dtype: torch.dtype, checkpointing: bool
) -> tuple[list[Column], Work]:
    """(the three columns, each with models and optimizers of its own; the rollouts with the log-probs of the stock
    policy)."""

    def models(stock: bool):
        return build(sizes, weights, stock=stock, dtype=dtype, checkpointing=checkpointing)

    first = Published(STOCK, models(True), work, stock=True)
    if work.logprobs is None:
        work = with_logprobs(work, first.old_logprobs().cpu())
        first.work = work
    return [first, Published(KERNELS, models(False), work, stock=False), Ours(OURS, models(False), work)], work


def compare(found: list[Column], row_of: dict[str, Row]) -> None:
    """One counted step of every column; differences from the first in ``errors``, ``wrong`` where they exceed
    ``TOLERANCE``."""
    first, exact, gradients = found[0], None, {}
    for column in found:
        row = row_of[column.name]
        for engine in column.engines().values():
            engine.keep = True
        for phase, call in column.phases():
            with counted(column) as count:
                call()
            row.counts[phase] = asdict(count)
        for engine in column.engines().values():
            engine.keep = False
        outcome = column.outcome()
        mine = {
            f"d_{name}.{key}": value
            for name, engine in column.engines().items()
            for key, value in taken(engine).items()
        }
        if column is first:
            exact, gradients = outcome, mine
        scores, true = (torch.cat([x.student, x.teacher[None]]) for x in (outcome, exact))
        row.errors = {
            "scores": float((scores - true).norm() / true.norm()),
            "discriminator_loss": relative(outcome.discriminator_loss, exact.discriminator_loss),
            "policy_loss": relative(outcome.policy_loss, exact.policy_loss),
            "logp": outcome.gap,
            **worst(mine, gradients),
        }
        largest = max(row.errors, key=lambda name: rank(row.errors[name]))
        if not row.errors[largest] <= TOLERANCE:  # NaN is wrong
            row.status, row.note = "wrong", f"{largest} is off by {row.errors[largest]:.1e}, allowed {TOLERANCE:.0e}"


def taken(engine) -> dict[str, Tensor]:
    gradient, engine.gradient = engine.gradient, {}
    return gradient


def rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(b))


def worst(
    found: dict[str, Tensor], exact: dict[str, Tensor], models: Sequence[str] = ("d_discriminator", "d_policy")
) -> dict[str, float]:
    """Per model, the largest relative difference of a parameter's gradient; infinite where one is missing."""
    result = {}
    for model in models:
        names = {name for name in {*found, *exact} if name.startswith(model)}
        floor = SMALL * max(float(exact[name].norm()) for name in names if name in exact)
        errors = [
            float((found[name] - exact[name]).norm()) / max(float(exact[name].norm()), floor)
            if name in found and name in exact
            else math.inf
            for name in names
        ]
        result[model] = max(errors, key=rank)
    return result


def measure(
    shape: Shape,
    sizes: Widths,
    weights: Weights,
    *,
    device: str,
    dtype: torch.dtype,
    checkpointing: bool,
    rounds: int,
) -> list[Row]:
    """Compares in float32 and times in ``dtype``, without wrong columns; ``rounds=0`` times nothing."""
    work = draw(shape, sizes)
    found, work = columns(work, sizes, weights, dtype=torch.float32, checkpointing=checkpointing)
    size = asdict(shape)
    rows = {column.name: Row(column.name, **size, status="ok") for column in found}
    compare(found, rows)
    if dtype != torch.float32:
        del found
        gc.collect()
        found, _ = columns(work, sizes, weights, dtype=dtype, checkpointing=checkpointing)
    found = [column for column in found if rows[column.name].status == "ok"]
    for column in list(found):
        row = rows[column.name]
        try:
            for _ in range(WARM_UP):
                _step(column, device)
            row.peak_mib = peak(lambda column=column: _step(column, device), device)
        except torch.OutOfMemoryError as error:
            row.status, row.note = "oom", str(error).splitlines()[0]
            found.remove(column)
            for engine in column.engines().values():
                engine.discard()
    spent: dict[str, list[dict[str, float]]] = {column.name: [] for column in found}
    for _ in range(rounds):
        for column in found:
            spent[column.name].append(_step(column, device))
            outcome = column.outcome()
            for name in ("discriminator_loss", "policy_loss"):
                rows[column.name].losses.setdefault(name, []).append(getattr(outcome, name))
    for name, turns in spent.items() if rounds else ():
        _fill(rows[name], turns, spent)
    return list(rows.values())


def _step(column: Column, device: str) -> dict[str, float]:
    """Milliseconds per phase and of the whole step."""
    found = {}
    for phase, call in column.phases():
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        found[phase] = (time.perf_counter() - start) * 1e3
    return found | {"step": sum(found.values())}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _fill(row: Row, turns: list[dict[str, float]], spent: dict[str, list[dict[str, float]]]) -> None:
    row.runs = len(turns)
    for phase in (*PHASES, "step"):
        values = [turn[phase] for turn in turns]
        fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
        row.ms_p20[phase], row.ms_p50[phase], row.ms_p80[phase] = fifths[0], statistics.median(values), fifths[3]
    for name, rival in (("of_stock", STOCK), ("of_kernels", KERNELS)):
        if rival in spent:
            pairs = zip(spent[rival], turns, strict=True)
            setattr(row, name, statistics.median(theirs["step"] / mine["step"] for theirs, mine in pairs))


def peak(call: Callable[[], object], device: str) -> float | None:
    """MiB that ``call`` needs beyond the memory in use before it; None if the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept from earlier columns would hide this one's
    before = _resident(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    call()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, field_name: str) -> float:
    """MiB"""
    line = next(row for row in status.read_text().splitlines() if row.startswith(field_name))
    return int(line.split()[1]) / 1024
