"""All problems of a data file at once: every row is parsed and every image decoded, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from prism_fast.data.images import DEFAULT_MAX_IMAGE_PIXELS
from prism_fast.data.problems import DataError, Place
from prism_fast.data.readers import read_pairs, read_sharegpt, read_tasks
from prism_fast.data.screen import screen
from prism_fast.models.processor import Processor

KINDS = ("sft", "tasks", "pairs")


@dataclass(frozen=True)
class Findings:
    """What a file holds: ``samples`` of ``form`` that can be used, and what is wrong with the others.

    ``prompt_tokens``: lengths of the expanded prompts that could be measured, too long ones included; empty without a
    processor.
    """

    path: Path
    form: str
    samples: int
    problems: list[DataError]
    prompt_tokens: list[int]


def check_file(
    path: str | Path,
    *,
    kind: str | None = None,
    require_teacher: bool = False,
    known_sources: Collection[str] | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    processor: Processor | None = None,
    max_prompt_tokens: int | None = None,
) -> Findings:
    """Read ``path`` as the format its name and first record say: parquet tasks, ShareGPT JSON, or jsonl pairs.

    ``kind`` (``sft``, ``tasks`` or ``pairs``) forces the format. With a ``processor``, prompts are measured as training
    does it, images expanded, and those of more than ``max_prompt_tokens`` are problems. ``known_sources``: see
    `read_tasks`.
    Problems of the file as a whole (missing, no such format, wrong column types) are findings like any other.
    """
    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(KINDS)}")
    if max_prompt_tokens is not None and processor is None:
        raise ValueError("max_prompt_tokens needs a processor: tokens are those of a particular policy")
    limits = dict(max_image_pixels=max_image_pixels)
    problems: list[DataError] = []
    lengths: list[int] = []
    form = "unknown"
    usable = 0
    try:
        form = _form(path) if kind is None else {"sft": "sharegpt"}.get(kind, kind)
        if form == "tasks":
            teacher = dict(require_teacher=require_teacher, known_sources=known_sources)
            samples = read_tasks(path, **teacher, **limits, problems=problems)
        elif form == "pairs":
            samples = read_pairs(path, **limits, problems=problems)
        else:
            samples = read_sharegpt(path, **limits, problems=problems)
        found = screen(samples, processor=processor, max_prompt_tokens=max_prompt_tokens, problems=problems)
        usable, lengths = len(found.samples), found.prompt_tokens
    except DataError as error:
        problems.append(error)
    return Findings(path, form, usable, problems, lengths)


def _form(path: Path) -> str:
    if path.suffix == ".parquet":
        return "tasks"
    if path.suffix == ".json":
        return "sharegpt"
    if path.suffix != ".jsonl":
        raise Place(path).error("", f"no known format ends with {path.suffix!r}", "Known: .parquet, .json, .jsonl")
    if not path.is_file():
        raise Place(path).error("", "the file does not exist", "Check the path")
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None  # the reader will name the line
    turns = isinstance(record, dict) and ({"messages", "conversations"} & set(record))
    return "sharegpt" if turns else "pairs"
