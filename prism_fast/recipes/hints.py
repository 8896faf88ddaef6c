"""What was meant by a value or a name that was refused: the nearest one, how to write it, how to get it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def nearest(name: str, names: Sequence[str], *, cutoff: float = 0.6) -> str:
    """``. Did you mean 'x'?`` of the most similar name, "" where none is similar."""
    match = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f". Did you mean {match[0]!r}?" if match else ""


def how_to_write(config: type, key: str, value: str | None) -> str:
    """How a list is written, and which allowed word is nearest to ``value``; "" for keys of other types.

    Args:
        config: a dataclass; ``key`` is a dotted path of its fields.
        value: as it was given on the command line; None if it was not.
    """
    kind = _type_of(config, key)
    if get_origin(kind) in (list, tuple):
        return "; it takes a list: " + (f"[{', '.join(['...'] * 2)}]" if value is None else f"'{key}=[{value}]'")
    if get_origin(kind) is Literal and value is not None:
        return nearest(value, [word for word in get_args(kind) if isinstance(word, str)], cutoff=0.5)
    return ""


def _type_of(config: type, key: str) -> Any:
    kind: Any = config
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def how_to_get(folder: str) -> str:
    """How to download a model whose name on the Hugging Face hub was given for a folder; "" if it is no such name."""
    if not _HUB_NAME.fullmatch(folder) or Path(folder).parent.is_dir():
        return ""
    name = folder.split("/")[1]
    return f". If it is a name on the Hugging Face hub, download it first: hf download {folder} --local-dir {name}"
