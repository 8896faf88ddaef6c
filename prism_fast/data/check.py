"""All problems of a data file at once: every row is parsed and every image decoded, nothing is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from prism_fast.data.images import DEFAULT_MAX_IMAGE_PIXELS
from prism_fast.data.problems import DataError, Place
from prism_fast.data.readers import read_pairs, read_sharegpt, read_tasks


@dataclass(frozen=True)
class Findings:
    """What a file holds: ``samples`` of ``form`` that can be used, and what is wrong with the others."""

    path: Path
    form: str
    samples: int
    problems: list[DataError]


def check_file(
    path: str | Path, *, require_teacher: bool = False, max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
) -> Findings:
    """Read ``path`` as the format its name and first record say: parquet tasks, ShareGPT JSON, or jsonl pairs.

    Problems of the file as a whole (missing, no such format, wrong column types) are findings like any other.
    """
    path = Path(path)
    problems: list[DataError] = []
    form = "unknown"
    usable = 0
    try:
        form = _form(path)
        if form == "tasks":
            samples = read_tasks(
                path, require_teacher=require_teacher, max_image_pixels=max_image_pixels, problems=problems
            )
        elif form == "pairs":
            samples = read_pairs(path, max_image_pixels=max_image_pixels, problems=problems)
        else:
            samples = read_sharegpt(path, max_image_pixels=max_image_pixels, problems=problems)
        for index in range(len(samples)):
            try:
                samples[index]
                usable += 1
            except DataError as error:
                problems.append(error)
    except DataError as error:
        problems.append(error)
    return Findings(path, form, usable, problems)


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
