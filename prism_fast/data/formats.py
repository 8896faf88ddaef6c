"""Tables of the readable file formats, and of the configuration's data files with their formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_fast.data.problems import DataError, Place
from prism_fast.data.readers import Samples, read_pairs, read_sharegpt, read_tasks


@dataclass(frozen=True)
class Wanted:
    """Demands on samples beyond their format: ``require_teacher`` and ``known_sources`` of tasks, the texts
    ``pair_texts`` of pairs; see `read_tasks`, `read_pairs`.
    """

    require_teacher: bool = False
    known_sources: Collection[str] | None = None
    pair_texts: Sequence[str] = ()


@dataclass(frozen=True)
class Format:
    """``matches``: whether a file with this suffix and this first record (None: not JSON) has the format. ``read``: of
    (path, wanted, further options of the readers) the samples."""

    suffixes: tuple[str, ...]
    matches: Callable[[dict[str, Any] | None], bool]
    read: Callable[..., Samples]


def _has_turns(record: dict[str, Any] | None) -> bool:
    return isinstance(record, dict) and bool({"messages", "conversations"} & set(record))


def _read_tasks(path: Path, wanted: Wanted, **options: Any) -> Samples:
    return read_tasks(path, require_teacher=wanted.require_teacher, known_sources=wanted.known_sources, **options)


FORMATS: dict[str, Format] = {
    "tasks": Format((".parquet",), lambda record: True, _read_tasks),
    "sharegpt": Format((".json", ".jsonl"), _has_turns, lambda path, wanted, **options: read_sharegpt(path, **options)),
    "pairs": Format(
        (".jsonl",),
        lambda record: not _has_turns(record),
        lambda path, wanted, **options: read_pairs(path, require=wanted.pair_texts, **options),
    ),
}


def format_of(path: Path) -> str:
    """The name of a file's format, by its suffix and, where several formats share that, its first record.

    Raises:
        DataError: no format has this suffix, or the file is needed to tell and does not exist.
    """
    possible = [name for name, format in FORMATS.items() if path.suffix in format.suffixes]
    if not possible:
        known = ", ".join(dict.fromkeys(suffix for format in FORMATS.values() for suffix in format.suffixes))
        raise Place(path).error("", f"no known format ends with {path.suffix!r}", f"Known: {known}")
    if len(possible) == 1:
        return possible[0]
    if not path.is_file():
        raise Place(path).error("", "the file does not exist", "Check the path")
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None  # the reader will name the line
    return next(name for name in possible if FORMATS[name].matches(record))


@dataclass(frozen=True)
class Source:
    """A file that a configuration names under ``data``: its format, and the stages that require it."""

    format: str
    stages: tuple[str, ...] = ()
    require_teacher: bool = False


SOURCES: dict[str, Source] = {
    "sft": Source("sharegpt", ("sft", "sft_continued")),
    "sft_val": Source("sharegpt", ("sft",)),
    "align": Source("tasks", ("warmup", "align"), require_teacher=True),
    "rlvr": Source("tasks", ("rlvr_direct", "rlvr")),
    "eval": Source("tasks"),  # where given, evaluated after each stage
    "pairs": Source("pairs"),  # where given, the warm-up reads it and not `align`
}
"""By the key under ``data``."""


def needed_sources(stages: Iterable[str], files: Mapping[str, object]) -> dict[str, str]:
    """The keys of `SOURCES` that a run of ``stages`` reads, each with the first stage (or ``eval``) that does.
    ``files``: by key; None or absent where there is none."""
    pairs = files.get("pairs") is not None
    needed: dict[str, str] = {}
    for stage in stages:
        keys = [key for key, source in SOURCES.items() if stage in source.stages]
        for key in ["pairs"] if stage == "warmup" and pairs else keys:
            needed.setdefault(key, stage)
    if files.get("eval") is not None:
        needed["eval"] = "eval"
    return needed


def open_file(
    path: Path, format: str, wanted: Wanted, *, max_image_pixels: int, problems: list[DataError] | None
) -> Samples:
    """The samples of a file in a format of `FORMATS`: every row parsed, no image decoded."""
    return FORMATS[format].read(path, wanted, max_image_pixels=max_image_pixels, problems=problems)
