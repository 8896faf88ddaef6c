"""A page with a few samples of a data file as training sees them: turns, images, texts with their spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from prism_fast.data.grammar import split_text
from prism_fast.data.problems import DataError
from prism_fast.data.samples import Demonstration, Pair, Samples, Task
from prism_fast.models.processor import Processor
from prism_fast.models.writing import write_whole
from prism_fast.report.samples import page_picture, segments, spread, visible

_SECTIONS = ("caption", "think", "answer")
_SIDE_TEXTS = ("caption", "cot", "response")
_TASK_FIELDS = ("data_source", "ground_truth", "equivalent_answers", "kind", "cluster")


@dataclass(frozen=True)
class Shown:
    """One sample on the page; ``problem`` in place of everything else where its images cannot be read."""

    title: str
    problem: str | None = None
    images: Sequence[Any] = ()
    turns: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, Sequence[tuple[str, str]], str | None]] = ()


def write_preview(samples: Samples, path: Path, *, count: int, processor: Processor | None = None) -> int:
    """Write the page to ``path`` with ``count`` samples, evenly spaced from the first to the last, and return how many
    it holds. With a ``processor`` the tokens of prompts and texts stand beside them.

    Raises:
        ValueError: ``count`` is below 1.
    """
    places = [samples.place(index) for index in range(len(samples))]
    chosen = spread(range(len(samples)), count)
    shown = [_shown(samples, index, processor) for index in chosen]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = environment.from_string(_asset("preview.html.j2")).render(
        name=visible(places[0].file.name),
        total=len(samples),
        style=_asset("report.css"),
        samples=shown,
        tokens=processor is not None,
    )
    write_whole(path, page)
    return len(shown)


def _shown(samples: Samples, index: int, processor: Processor | None) -> Shown:
    place = samples.place(index)
    try:
        sample = samples[index]
        tokens = None if processor is None else len(processor.encode_prompt(sample.messages, sample.images).input_ids)
    except (DataError, ValueError) as error:
        return Shown(place.row, problem=visible(str(error)))
    facts = [(name, str(value)) for name in _TASK_FIELDS if (value := getattr(sample, name, None))]
    facts += [("image", f"{image.width} x {image.height} pixels") for image in sample.images]
    if tokens is not None:
        facts.append(("prompt", f"{tokens} tokens"))
    return Shown(
        title=f"{place.row} · {visible(sample.uid)}",
        images=[page_picture(image) for image in sample.images],
        turns=[(turn["role"], visible(_turn_text(turn["content"]))) for turn in sample.messages],
        facts=[(name, visible(value)) for name, value in facts],
        texts=[_text(name, text, processor) for name, text in _texts(sample)],
    )


def _turn_text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join("🖼" if part["type"] == "image" else part["text"] for part in content)


def _texts(sample: Demonstration | Task | Pair) -> list[tuple[str, str]]:
    """The texts that a stage learns from or scores, by name."""
    names = ["response", *(f"{side}_{text}" for side in ("teacher", "student") for text in _SIDE_TEXTS)]
    return [(name, text) for name in names if (text := getattr(sample, name, None)) is not None]


def _text(name: str, text: str, processor: Processor | None) -> tuple[str, Sequence[tuple[str, str]], str | None]:
    """Name (with its tokens), pieces, and what is wrong with a whole response that has no sections."""
    split = split_text(text)
    pieces, _ = segments(text, {section: split.char_spans.get(section) for section in _SECTIONS})
    whole = name == "response" or name.endswith("_response")
    note = "no caption, think and answer sections in this order" if whole and not split.valid else None
    title = name.replace("_", " ")
    if processor is not None:
        title += f" · {len(processor.encode_plain(text))} tokens"
    return title, [(section, visible(piece)) for section, piece in pieces], note


def _asset(name: str) -> str:
    return (resources.files("prism_fast.report") / "assets" / name).read_text(encoding="utf-8")
