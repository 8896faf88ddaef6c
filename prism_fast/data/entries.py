"""The form of the data keys of a recipe: a path, a hub name, a glob, a list of these, or mappings with options.

    data:
      sft: llava.json
      rlvr: [data/geo3k, {path: mine/*.parquet, weight: 2, columns: {problem: question}}]

Entries of one list are read in order. With weights, which every entry of the list then has, a training stage draws from
them in these shares; without, each sample is drawn once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion", "system"),
    *("images", "problem", "question", "answer", "data_source", "reward_model", "extra_info", "uid", "id"),
    *("teacher_response", "teacher_caption", "teacher_cot", "student_response", "student_caption", "student_cot"),
)
"""Names of fields that ``columns`` may map to a name of the file."""


@dataclass(frozen=True)
class Entry:
    """One data set: ``path`` is a file, a folder, a glob or ``owner/name`` on the Hugging Face hub. ``split`` of a
    folder or hub data set, ``name`` of a hub data set's configuration, ``columns`` by our names, ``image_root`` where
    relative image paths begin (none: the file's folder)."""

    path: str
    weight: float | None = None
    split: str | None = None
    name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: str | None = None


def entries_of(value: Any, key: str, *, weights: bool = True) -> tuple[Entry, ...]:
    """The entries that ``value`` of the recipe's ``key`` names. ``weights``: whether they may have some.

    Raises:
        ValueError: names the key, what it holds and what is allowed.
    """
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise ValueError(f"{key} is an empty list; give a path, or leave the key out")
    one = len(listed) == 1 and listed is not value
    entries = tuple(_entry(item, key if one else f"{key}[{n}]") for n, item in enumerate(listed))
    weighted = [entry.weight is not None for entry in entries]
    if any(weighted) and not weights:
        raise ValueError(f"{key} has weights; only data.sft, data.align and data.rlvr are drawn by weights")
    if any(weighted) and not all(weighted):
        raise ValueError(f"{key}[{weighted.index(False)}] has no weight; give every entry of the list one, or none")
    return entries


def check_columns(columns: Any, key: str) -> None:
    """Raise ValueError unless ``columns`` maps names of `COLUMNS` to names of a file."""
    if not isinstance(columns, Mapping):
        raise ValueError(f"{key} must be a mapping of our names to those of the file, got {columns!r}")
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            swapped = f" (the other way round? {key}.{theirs}={ours})" if theirs in COLUMNS else ""
            raise ValueError(f"{key}.{ours} is not a field{swapped}; the fields are {', '.join(COLUMNS)}")
        if not isinstance(theirs, str) or not theirs:
            raise ValueError(f"{key}.{ours} must be the name of the file's column, got {theirs!r}")


def _entry(item: Any, key: str) -> Entry:
    if isinstance(item, Mapping):
        allowed = [entry.name for entry in fields(Entry)]
        for name in item:
            if name not in allowed:
                raise ValueError(f"{key}.{name} is not a key; allowed: {', '.join(allowed)}")
        if "path" not in item:
            raise ValueError(f"{key} has no path; give {{path: FILE, …}}")
        for name in ("path", "split", "name", "image_root"):
            if not isinstance(item.get(name, "x"), str) or not item.get(name, "x"):
                raise ValueError(f"{key}.{name} must be a text, got {item[name]!r}")
        weight = item.get("weight", 1)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
            raise ValueError(f"{key}.weight must be a positive number, got {weight!r}")
        check_columns(item.get("columns", {}), f"{key}.columns")
        return Entry(**item)
    text = str(item) if hasattr(item, "__fspath__") else item
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key} must be a path, a hub name, a glob, a list or {{path: FILE, …}}, got {item!r}")
    return Entry(text)


def shown(value: Any) -> str:
    """The paths of a key's value, for messages."""
    return ", ".join(entry.path for entry in entries_of(value, "data"))
