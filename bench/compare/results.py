"""Compares two result files of `bench ops`, of `bench step` or of `bench train`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOWER = 0.05  # a median or peak that grew by more is a regression
SAME_MACHINE = ("card", "processor", "threads")
VERSIONS = ("torch", "cuda", "python", "triton", "liger-kernel", "transformers", "trl", "verl", "cut-cross-entropy")
SAME_SETTINGS = ("size", "device", "depth", "dtype", "gradient_checkpointing", "tolerance")
# Errors are compared like the ops' accuracy: twice the other's, and some units in the last place.
WORSE = 2.0
UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class NotComparable(ValueError):
    """Two files whose figures mean different things."""


@dataclass(frozen=True)
class Line:
    """A measurement in both files. ``verdict``: "ok", "slower", "larger", "faster" (regressions are slower and larger),
    or "not compared", with ``note`` for the reason. ``before`` and ``after`` in milliseconds or MiB."""

    name: str
    verdict: str
    before: float | None = None
    after: float | None = None
    unit: str = "ms"
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "larger", "not compared")


def compare(before: Path, after: Path) -> tuple[list[Line], list[str]]:
    """(lines, remarks) of two files.

    Raises:
        NotComparable: a file is no result, they are results of different commands or settings, or of different
            machines.
    """
    old, new = _read(before), _read(after)
    if _kind(old) != _kind(new):
        raise NotComparable(f"{before} is of bench {_kind(old)}, {after} of bench {_kind(new)}")
    for name in SAME_MACHINE:
        if old["machine"].get(name) != new["machine"].get(name):
            raise NotComparable(
                f"{before} and {after} are of different machines: {name} {old['machine'].get(name)!r} and "
                f"{new['machine'].get(name)!r}; measure both on one"
            )
    for name in SAME_SETTINGS:
        if old.get(name) != new.get(name):
            raise NotComparable(f"{before} and {after} differ in {name}: {old.get(name)!r} and {new.get(name)!r}")
    rows = [{_name(row): row for row in record["rows"]} for record in (old, new)]
    remarks = [
        f"{name}: {old['machine'].get(name)} and {new['machine'].get(name)}"
        for name in (*VERSIONS, "commit")
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    loads = [record["machine"].get("load") for record in (old, new)]
    if any(load is not None and load > 1 for load in loads):
        remarks.append(f"load {loads[0]:.1f} and {loads[1]:.1f}: other work ran beside, times mean little")
    remarks += [
        f"only in {path}: {name}"
        for path, a, b in ((before, *rows), (after, *rows[::-1]))
        for name in a
        if name not in b
    ]
    lines = [line for name, row in rows[0].items() if name in rows[1] for line in _lines(name, row, rows[1][name])]
    if not lines:
        raise NotComparable(f"{before} and {after} have no measurement in common")
    return lines, remarks


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path} cannot be read: {error}") from None
    if isinstance(record, dict) and "section" in record:  # a section of gpu_suite.sh
        record = record.get("data")
    if not isinstance(record, dict) or not {"machine", "rows"} <= set(record) or not record["rows"]:
        raise NotComparable(f"{path} is no result of `prism-fast bench ops --json`, `step --json` or `train --json`")
    return record


def _kind(record: dict[str, Any]) -> str:
    row = record["rows"][0]
    return "ops" if "column" not in row else "step" if "teacher" in row else "train"


def _name(row: dict[str, Any]) -> str:
    if "column" in row:
        return f"{row['column']}, prompt {row['prompt']}, response {row['response']}, {row['rollouts']} rollouts"
    return f"{row['op']} {row['shape']} {row['dtype']}, {row['provider']}, {row['mode']}"


def _lines(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Line]:
    if old["status"] != new["status"] or "wrong" in (old["status"], new["status"]):
        yield Line(
            name, "not compared", note=f"status {old['status']} and {new['status']}: {new['note'] or old['note']}"
        )
        return
    if old["status"] != "ok":
        return  # absent or unsupported in both
    for key, a, b in _errors(old, new):
        if a != a or b != b or max(a, b) > WORSE * min(a, b) + 4 * UNITS.get(old.get("dtype", "float32"), 2.0**-23):
            yield Line(name, "not compared", note=f"another result: error of {key} {a:.1e} and {b:.1e}")
            return
    counts = old.get("counts", {}), new.get("counts", {})
    if counts[0] != counts[1]:
        phase = next(p for p in {**counts[0], **counts[1]} if counts[0].get(p) != counts[1].get(p))
        yield Line(name, "not compared", note=f"other work: {phase} {counts[0].get(phase)} and {counts[1].get(phase)}")
        return
    times = (old["ms_p50"], new["ms_p50"])
    times = times if isinstance(times[0], dict) else ({"": times[0]}, {"": times[1]})
    for part, a in times[0].items():
        b = times[1].get(part)
        if a is not None and b is not None:
            yield _line(f"{name}, {part}" if part else name, a, b, "ms", "slower", "faster")
    if old.get("peak_mib") and new.get("peak_mib") is not None:
        yield _line(f"{name}, peak", old["peak_mib"], new["peak_mib"], "MiB", "larger", "smaller")


def _errors(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    pairs = old["errors"] or {}, new["errors"] or {}
    for key in {**pairs[0], **pairs[1]}:
        yield key, pairs[0].get(key, float("nan")), pairs[1].get(key, float("nan"))


def _line(name: str, before: float, after: float, unit: str, worse: str, better: str) -> Line:
    verdict = worse if after > before * (1 + SLOWER) else better if after < before * (1 - SLOWER) else "ok"
    return Line(name, verdict, before, after, unit)


def table(lines: list[Line]) -> list[str]:
    """What is not compared and what changed by more than 5 %, the worst first, then how many did not change."""
    shown = [line for line in lines if line.verdict != "ok"]
    shown.sort(key=lambda line: -line.after / line.before if line.before else -float("inf"))
    found = []
    for line in shown:
        if line.before is None or line.after is None:
            found.append(f"{line.verdict:<13}{line.name}: {line.note}")
        else:
            change = f"{100 * (line.after / line.before - 1):+.1f} %"
            found.append(
                f"{line.verdict:<13}{change:>9}  {line.before:.4g} -> {line.after:.4g} {line.unit}  {line.name}"
            )
    found.append(f"{len(lines) - len(shown)} of {len(lines)} within {100 * SLOWER:.0f} %")
    return found
