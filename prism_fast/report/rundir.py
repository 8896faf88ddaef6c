"""Reads the directory of a run, finished or not: configuration, metrics, evaluations, rollouts, images.

A run that was killed leaves a partial last line or an unfinished compressed frame. Complete records are read; a
sentence in ``problems``, shown in the report, names anything missing. Nothing is filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
import zstandard

# In the order of a run: stages that end with an evaluation, and all stages.
EVALUATED = ("sft", "sft_continued", "rlvr_direct", "align", "rlvr")
TRAINED = ("sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EVAL_FIELDS = ("uid", "kind", "cluster", "correct", "format", "length")


@dataclass(frozen=True)
class Series:
    """One metric of one stage: ``steps`` [n] ascending, ``values`` [n]."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunDirectory:
    """Everything but the rollouts, which are streamed by `read_rollouts` because a long run has gigabytes of them."""

    path: Path
    config: dict[str, Any] | None
    steps: dict[str, list[dict[str, Any]]]  # stage -> its records by ascending step, one per step
    evals: dict[str, list[dict[str, Any]]]  # stage -> items sorted by uid
    eval_metrics: dict[str, dict[str, Any]]  # stage -> metrics that the run logged of its evaluation
    finished: dict[str, float]  # stage -> its wall-clock seconds, evaluation included; logged when a stage ends
    environment: dict[str, Any]  # versions and machine
    incomplete: frozenset[str]  # stages whose evaluation file ends inside a line
    problems: list[str] = field(default_factory=list)

    def series(self, stage: str, key: str) -> Series | None:
        """The metric over the steps that have it, or None where no step has."""
        found = [
            (record["step"], float(record[key]))
            for record in self.steps.get(stage, ())
            if isinstance(record.get(key), int | float)
        ]
        if not found:
            return None
        return Series(tuple(step for step, _ in found), tuple(value for _, value in found))

    def keys(self, stage: str) -> list[str]:
        """All metrics with a number on any step of the stage, sorted."""
        found = {
            key
            for record in self.steps.get(stage, ())
            for key, value in record.items()
            if isinstance(value, int | float)
        }
        return sorted(found - {"stage", "step"})

    @property
    def planned(self) -> tuple[str, ...]:
        """Stages of the configuration (all where it does not say); none for `eval` alone."""
        if "eval" in self.evals:
            return ()
        stages = (self.config or {}).get("stages")
        return tuple(stages) if isinstance(stages, list) else TRAINED

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Stages with an evaluation on disk, in the order of a run, unknown names last."""
        return (*(s for s in EVALUATED if s in self.evals), *sorted(set(self.evals) - set(EVALUATED)))

    @property
    def complete(self) -> bool:
        """Whether every planned stage has logged its end."""
        return all(stage in self.finished for stage in self.planned)

    @property
    def rollout_stages(self) -> tuple[str, ...]:
        """Stages with a rollout dump, in the order of a run."""
        names = {entry.name.removesuffix(".jsonl.zst") for entry in (self.path / "rollouts").glob("*.jsonl.zst")}
        return (*(s for s in TRAINED if s in names), *sorted(names - set(TRAINED)))

    def image(self, digest: str) -> bytes | None:
        """The PNG with this SHA-256, or None where the run directory does not have it.

        Raises:
            ValueError: ``digest`` is not 64 hexadecimal digits (it becomes part of a path).
        """
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"image name {digest!r} is not a SHA-256 in lower-case hexadecimal")
        path = self.path / "rollouts" / "images" / f"{digest}.png"
        return path.read_bytes() if path.is_file() else None

    def last_written(self) -> float | None:
        """Time of the latest write to the run's records, in seconds since the epoch."""
        records = [self.path / "config.yaml", self.path / "metrics.jsonl", *self.path.glob("evals/*.jsonl")]
        records += self.path.glob("rollouts/*.jsonl.zst")
        return max((record.stat().st_mtime for record in records if record.is_file()), default=None)


def read_run(path: str | Path) -> RunDirectory:
    """Read a run directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it has neither ``config.yaml`` nor ``metrics.jsonl``, or a record does not have a run's format.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no run directory at {path}")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is not a run directory: it has neither config.yaml nor metrics.jsonl")
    problems: list[str] = []
    config = _read_config(path / "config.yaml", problems)
    environment = _read_environment(path / "environment.json", problems)
    steps, eval_metrics, finished = _read_metrics(path / "metrics.jsonl", problems)
    evals: dict[str, list[dict[str, Any]]] = {}
    incomplete: set[str] = set()
    for file in sorted(path.glob("evals/*.jsonl")):
        items, whole = _read_eval(file, problems)
        if items:
            evals[file.stem] = items
        if not whole:
            incomplete.add(file.stem)
    return RunDirectory(
        path, config, steps, evals, eval_metrics, finished, environment, frozenset(incomplete), problems
    )


def read_rollouts(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Stream the records of one ``.jsonl.zst`` (frames may be concatenated); ``problems`` names a truncated end.

    Raises:
        ValueError: a line is JSON but not an object with ``step``, ``group`` and ``text``.
    """
    tail = b""
    number = 0
    for block in _decompress(path, problems):
        *lines, tail = (tail + block).split(b"\n")
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                yield _record(line, path, number, ("step", "group", "text"))
            except json.JSONDecodeError:
                problems.append(
                    f"rollouts/{path.name} line {number} is not JSON (cut by a kill before a resume?) and is left out."
                )
    if tail.strip():
        problems.append(f"rollouts/{path.name} ends inside line {number + 1}; that rollout is left out.")


def _decompress(path: Path, problems: list[str]) -> Iterator[bytes]:
    with path.open("rb") as file:
        frame = None
        while chunk := file.read(1 << 20):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    block = frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    problems.append(f"rollouts/{path.name} is damaged ({error}); what lies before is shown.")
                    return
                if block:
                    yield block
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        problems.append(f"rollouts/{path.name} ends inside a compressed frame; what lies before is shown.")


def _read_config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        problems.append("config.yaml is missing, so recipe, seed and planned stages are not known.")
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping, found {type(config).__name__}")
    return config


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("environment.json is missing, so the versions that the run used are not known.")
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold an object, found {type(facts).__name__}")
    return facts


def _read_metrics(
    path: Path, problems: list[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]], dict[str, float]]:
    """Training records per stage, evaluation records per stage, and seconds per finished stage."""
    if not path.is_file():
        problems.append("metrics.jsonl is missing: there is nothing to draw.")
        return {}, {}, {}
    merged: dict[str, dict[int, dict[str, Any]]] = {}
    evals: dict[str, dict[str, Any]] = {}
    finished: dict[str, float] = {}
    repeated = 0
    records, _ = _read_lines(path, ("stage", "step"), problems, tolerate_inside=True)
    for record in records:
        if record["stage"] == "eval":
            evals[str(record.get("after"))] = record
            continue
        if record["stage"] == "data":  # not a stage: samples left out while reading
            if (note := _left_out(record)) is not None and note not in problems:
                problems.append(note)
            continue
        if record["stage"] == "stage":  # not a stage: notes that one has ended
            finished[str(record.get("name"))] = float(record["time/seconds"])
            continue
        for key, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError(
                    f"{path}: {key!r} of {record['stage']} step {record['step']} is {value!r}, not a number or text"
                )
        step = merged.setdefault(record["stage"], {}).setdefault(record["step"], {})
        # Two lines of a step carry different metrics (training, validation), or a resumed run repeated the step.
        repeated += any(key in step for key in record if key not in ("stage", "step"))
        step.update(record)
    if repeated:
        problems.append(
            f"{repeated} lines of metrics.jsonl repeat a step (a resumed run does that); the later line counts."
        )
    return {stage: [by_step[step] for step in sorted(by_step)] for stage, by_step in merged.items()}, evals, finished


def _left_out(record: dict[str, Any]) -> str | None:
    """A sentence about the samples that a run skipped, None if it used them all."""
    reasons = {
        key.removeprefix("data/skipped_"): n for key, n in record.items() if key.startswith("data/skipped_") and n
    }
    if not reasons:
        return None
    shown = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
    total = record["data/kept"] + sum(reasons.values())
    return f"{sum(reasons.values())} of {total} samples of data.{record['name']} were left out ({shown})."


def _read_eval(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], bool]:
    items, whole = _read_lines(path, _EVAL_FIELDS, problems, tolerate_inside=False)
    seen: set[str] = set()
    for item in items:
        if item["uid"] in seen:
            raise ValueError(f"{path}: uid {item['uid']!r} occurs twice")
        if item["correct"] not in (0, 1) or item["format"] not in (0, 1):
            raise ValueError(f"{path}: uid {item['uid']!r}: correct and format must be 0 or 1")
        seen.add(item["uid"])
    return sorted(items, key=lambda item: str(item["uid"])), whole


def _read_lines(
    path: Path, fields: tuple[str, ...], problems: list[str], *, tolerate_inside: bool
) -> tuple[list[dict[str, Any]], bool]:
    """All whole records of a JSON-lines file, and whether it ends with a whole line.

    A run killed in the middle of a line and resumed leaves a broken line inside ``metrics.jsonl``: it is skipped there
    and named in ``problems`` (``tolerate_inside``). In an evaluation it is an error: items are compared one by one.
    """
    name = path.name if path.parent.name != "evals" else f"evals/{path.name}"
    content = path.read_bytes()
    lines = content.split(b"\n")
    records = []
    whole = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        last = number == len(lines)  # only then does the line lack its newline
        try:
            records.append(_record(line, path, number, fields))
        except json.JSONDecodeError as error:
            if last:
                whole = False
                problems.append(f"{name} ends inside line {number}: the run was killed or is still writing.")
            elif tolerate_inside:
                problems.append(f"{name} line {number} is not JSON (cut by a kill before a resume?) and is left out.")
            else:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return records, whole


def _record(line: bytes, path: Path, number: int, fields: tuple[str, ...]) -> dict[str, Any]:
    record = json.loads(line.decode("utf-8", errors="replace"))
    if not isinstance(record, dict):
        raise ValueError(f"{path} line {number} must be a JSON object, found {type(record).__name__}")
    for name in fields:
        if name not in record:
            raise ValueError(f"{path} line {number} has no field {name!r}; it has {sorted(record)}")
    return record
