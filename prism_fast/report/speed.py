"""Where the time of a stage went: its speed and memory, the parts of its steps, and its pass counters."""

from __future__ import annotations

from dataclasses import dataclass

from prism_fast.models.writing import shown_bytes
from prism_fast.report.rundir import RunDirectory
from prism_fast.report.summary import duration, stage_name

ABSENT = "–"


@dataclass(frozen=True)
class Speed:
    """Texts of one stage. ``parts``: (name, total, share of the stage, mean per step); ``counters``: (name, total, mean
    per step)."""

    name: str
    total: str  # wall time, evaluation included
    steps: int
    step: str  # mean wall time of a step
    tokens_per_second: str
    peak_memory: str
    mfu: str
    parts: tuple[tuple[str, str, str, str], ...]
    counters: tuple[tuple[str, str, str], ...]


def speed_of(run: RunDirectory, stage: str) -> Speed | None:
    """None where the stage logged neither its end nor a metric of time, speed, memory or passes."""
    whole = run.finished.get(stage)
    logged = {key: run.series(stage, key) for key in run.keys(stage) if key.startswith(("time/", "perf/", "passes/"))}
    values = {key: series.values for key, series in logged.items() if series is not None}
    if whole is None and not values:
        return None
    seconds = values.pop("time/step", None)
    rates, memory, mfu = (values.pop(f"perf/{name}", None) for name in ("tokens_per_second", "peak_memory_mib", "mfu"))
    parts, counters = [], []
    for key, series in values.items():
        total, mean = sum(series), sum(series) / len(series)
        if key.startswith("time/"):
            share = ABSENT if not whole else f"{100 * total / whole:.0f} %"
            parts.append((total, (key.removeprefix("time/"), duration(total), share, f"{1000 * mean:.0f} ms")))
        else:
            name = key.removeprefix("passes/").removeprefix("perf/").replace("_", " ")
            counters.append((name, f"{total:g}", f"{mean:.2f}"))
    parts.sort(key=lambda part: -part[0])  # the dearest first
    return Speed(
        name=stage_name(stage),
        total="not finished" if whole is None else duration(whole),
        steps=sum(record["step"] > 0 for record in run.steps.get(stage, ())),  # 0 holds what was before the first
        step=ABSENT if seconds is None else f"{1000 * sum(seconds) / len(seconds):.0f} ms",
        tokens_per_second=ABSENT if rates is None else f"{_rate(rates, seconds):,.0f}",
        peak_memory=ABSENT if memory is None else shown_bytes(int(max(memory) * 2**20)),
        mfu=ABSENT if mfu is None else f"{100 * sum(mfu) / len(mfu):.1f} %",
        parts=tuple(row for _, row in parts),
        counters=tuple(counters),
    )


def _rate(rates: tuple[float, ...], seconds: tuple[float, ...] | None) -> float:
    """All tokens over all seconds of the steps that count tokens; the mean of the steps where their seconds are not
    known."""
    if seconds is None or len(seconds) != len(rates):
        return sum(rates) / len(rates)
    return sum(rate * second for rate, second in zip(rates, seconds, strict=True)) / sum(seconds)
