"""Checks and times the providers of one op. They take turns in one process, on the same inputs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from .op import LIMITS, Absent, Inputs, Op, Provider, Row, Unsupported

OURS = "prism_fast"
LEAST_RUNS = 3
WARM_UP = 2
COLD_BYTES = 256 << 20  # more than any card's L2


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_float64(x: Inputs, leaves: tuple[str, ...]) -> Inputs:
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in x.items()}
    return {name: t.requires_grad_() if name in leaves else t for name, t in wide.items()}


def errors(op: Op, found: tuple, exact: tuple) -> dict[str, float]:
    """Normwise relative error of every result and gradient; of a scalar below 1 the absolute error, because it is a
    mean of terms of size 1."""
    names = [f"result {i}" for i in range(len(exact[0]))] + [f"d_{leaf}" for leaf in op.leaves]
    result = {}
    for name, a, b in zip(names, (*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"{name} is {list(a.shape)}, not {list(b.shape)}")
        size = b.norm() if b.dim() else b.abs().clamp(min=1.0)
        result[name] = ((a.double() - b).norm() / size).item()
    return result


def check(op: Op, provider: Provider, x: Inputs, exact: tuple, device: str) -> tuple[dict[str, float], float | None]:
    """Errors of one forward and backward and, on a card, its peak memory beyond the inputs in MiB."""
    if device != "cuda":
        return errors(op, op.run(provider, x), exact), None
    # The first run compiles and tunes, which needs memory of its own.
    op.run(provider, x)
    synchronise(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = op.run(provider, x)
    synchronise(device)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return errors(op, found, exact), peak


def attempt(op: Op, name: str, provider: Provider, x: Inputs, exact: tuple, device: str, limit: float) -> dict:
    """Fields of the provider's rows that do not depend on the mode: status, note, errors, memory. An error above
    ``limit`` makes the status ``wrong``."""
    try:
        found, peak = check(op, provider, x, exact, device)
    except Absent as error:
        return {"status": "absent", "note": str(error)}
    except Unsupported as error:
        return {"status": "unsupported", "note": str(error)}
    except torch.cuda.OutOfMemoryError as error:
        return {"status": "oom", "note": str(error).splitlines()[0]}
    except Exception as error:  # other packages refuse in many ways; ours must not fail
        note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if "CUDA error" in note:
            raise  # the CUDA context is broken, and all later results would be meaningless
        return {"status": "wrong" if name.startswith(OURS) else "unsupported", "note": note}
    worst = max(found.values())
    bad = not worst <= limit  # NaN is bad
    return {
        "status": "wrong" if bad else "ok",
        "note": f"error above {limit:g}" if bad else "",
        "error": worst,
        "errors": found,
        "peak_mib": peak,
    }


def timed(call: Callable[[], object], device: str, cold: torch.Tensor | None) -> tuple[float, object]:
    """(milliseconds of a call with everything that it enqueues, its value). ``cold`` overwrites the caches first."""
    if cold is not None:
        cold.zero_()
    synchronise(device)
    start = time.perf_counter()
    value = call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3, value


def one_round(op: Op, provider: Provider, x: Inputs, device: str, cold: torch.Tensor | None) -> dict[str, float]:
    def inference() -> object:
        with torch.no_grad():
            return provider(x)

    if op.modes == ("full",):
        return {"full": timed(lambda: provider(x), device, cold)[0]}
    spent = {"inference": timed(inference, device, cold)[0]}
    spent["forward"], results = timed(lambda: provider(x), device, cold)
    spent["backward"] = timed(partial(op.backward, results, x), device, cold)[0]
    del results
    spent["full"], _ = timed(lambda: op.backward(provider(x), x), device, cold)
    return spent


def measure(
    op: Op,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float,
    ceiling: dict[str, float],
    only: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """Rows of every provider in every mode. Timed rounds end after ``seconds``; there are at least three."""
    x = op.inputs(shape, dtype, device)
    exact = op.run(op.exact, in_float64(x, op.leaves))
    chosen = {name: provider for name, provider in op.providers.items() if only(name)}
    fields = {name: attempt(op, name, provider, x, exact, device, LIMITS[dtype]) for name, provider in chosen.items()}
    del exact
    gc.collect()
    runners = {name: provider for name, provider in chosen.items() if fields[name]["status"] == "ok"}
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for turn in range(WARM_UP):
        for provider in runners.values():
            if turn or device == "cuda":
                one_round(op, provider, x, device, cold)
    end = time.perf_counter() + seconds
    rounds = 0
    while runners and (rounds < LEAST_RUNS or time.perf_counter() < end):
        for name, provider in runners.items():
            times[name].append(one_round(op, provider, x, device, cold))
        rounds += 1
    rows = []
    for name in chosen:
        for mode in op.modes:
            row = Row(op.name, name, mode, "x".join(map(str, shape)), str(dtype).removeprefix("torch."), **fields[name])
            if row.status == "ok":
                spent, eager = ([turn[mode] for turn in times.get(who, ())] for who in (name, "eager"))
                _fill(row, spent, op, op.work(shape, dtype, mode), ceiling)
                if eager:
                    row.of_eager = statistics.median(a / b for a, b in zip(spent, eager, strict=True))
            rows.append(row)
    return rows


def _fill(row: Row, spent: list[float], op: Op, work: float, ceiling: dict[str, float]) -> None:
    row.ms_p20, row.ms_p50, row.ms_p80 = percentiles(spent)
    row.runs = len(spent)
    row.unit = op.unit
    row.rate = work / (row.ms_p50 * 1e-3) / (1e12 if op.unit == "TFLOP/s" else 1e9)
    key = f"{op.unit} {row.dtype}" if op.unit == "TFLOP/s" else op.unit
    row.ceiling_percent = 100 * row.rate / ceiling[key] if key in ceiling else None


def percentiles(spent: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    fifths = statistics.quantiles(spent, n=5, method="inclusive")
    return fifths[0], statistics.median(spent), fifths[3]


def measured_ceiling(device: str, dtypes: set[torch.dtype]) -> dict[str, float]:
    """Rates that this machine reaches in this process: of a large product per dtype, and of a copy (bytes read and
    written)."""
    size, copied = (8192, 1 << 30) if device == "cuda" else (768, 1 << 26)
    found = {}
    for dtype in dtypes:
        a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        spent = [timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, None)[0] for _ in range(8)][3:]
        found[f"TFLOP/s {str(dtype).removeprefix('torch.')}"] = 2 * size**3 / statistics.median(spent) / 1e9
    a = torch.ones(copied, dtype=torch.uint8, device=device)
    out = torch.empty_like(a)
    spent = [timed(lambda: out.copy_(a), device, None)[0] for _ in range(8)][3:]
    found["GB/s"] = 2 * copied / statistics.median(spent) / 1e6
    return found
