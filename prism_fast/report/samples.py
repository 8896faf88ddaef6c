"""Chooses sample rollouts by position (never by quality) and prepares them for the page: spans, images, scores."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any

from PIL import Image

from prism_fast.report.rundir import RunDirectory, read_rollouts

MAX_ROLLOUTS = 60
MAX_STEPS = 5  # per stage: first, last and evenly spaced ones between
_MAX_IMAGE_SIDE = 512  # pixels; larger images are scaled down for the page
_SPANS = ("caption", "think", "answer")


@dataclass(frozen=True)
class Group:
    """Rollouts of one prompt at one step, in the order of the dump."""

    stage: str
    step: int
    first: dict[str, Any]  # the fields that the group's rollouts share: question, images, ground truth, teacher
    rollouts: tuple[dict[str, Any], ...]
    total: int  # rollouts of the group in the dump, shown or not


def choose_groups(run: RunDirectory, problems: list[str], *, limit: int = MAX_ROLLOUTS) -> list[Group]:
    """At most ``limit`` rollouts: per stage up to `MAX_STEPS` steps from first to last, one group of each.

    The group is the first of its step, so the choice does not depend on the content of rollouts.
    """
    stages = run.rollout_stages
    per_stage = limit // max(1, len(stages))
    groups: list[Group] = []
    for stage in stages:
        path = run.path / "rollouts" / f"{stage}.jsonl.zst"
        # Two passes over the stream: a long run's dump does not fit in memory.
        first_group: dict[int, int] = {}
        for record in read_rollouts(path, problems):
            first_group.setdefault(record["step"], record["group"])
        if not first_group:
            problems.append(f"rollouts/{path.name} holds no whole rollout.")
            continue
        chosen = spread(sorted(first_group), min(MAX_STEPS, per_stage))
        found: dict[int, list[dict[str, Any]]] = {step: [] for step in chosen}
        previous = None
        for record in read_rollouts(path, []):
            step = record["step"]
            if previous is not None and step < previous:  # a resumed run repeats steps: the later dump counts
                for later in chosen:
                    if later >= step:
                        found[later] = []
            previous = step
            if step in found and record["group"] == first_group[step]:
                found[step].append(record)
        shown = max(1, per_stage // len(chosen))
        groups += [
            Group(stage, step, records[0], tuple(islice(records, shown)), len(records))
            for step, records in found.items()
            if records
        ]
    return groups


def spread(values: Sequence[int], count: int) -> list[int]:
    """``count`` of the ascending values, first and last among them, evenly spaced by position."""
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if count >= len(values):
        return list(values)
    if count == 1:
        return [values[-1]]
    return [values[index * (len(values) - 1) // (count - 1)] for index in range(count)]


def segments(text: str, spans: dict[str, Any] | None) -> tuple[list[tuple[str, str]], str | None]:
    """Cut a response into (span name or "", text) pieces that join to ``text``; the second result names a fault.

    ``spans`` are character offsets [start, end). Spans that overlap or leave the text are not drawn: the whole text is
    returned as one piece, with a fault.
    """
    cuts = []
    for name in _SPANS:
        bounds = (spans or {}).get(name)
        if bounds is None:
            continue
        start, end = bounds
        if start < 0 or end < start or end > len(text):
            return [("", text)], f"span {name} [{start}, {end}) is not inside the text of {len(text)} characters"
        if end > start:
            cuts.append((start, end, name))
    cuts.sort()
    pieces, position = [], 0
    for start, end, name in cuts:
        if start < position:
            return [("", text)], f"span {name} [{start}, {end}) overlaps the one before it"
        pieces += [("", text[position:start]), (name, text[start:end])]
        position = end
    pieces.append(("", text[position:]))
    return [(name, piece) for name, piece in pieces if piece], None


def visible(text: str) -> str:
    """Text that a page can hold: control characters as their pictures (U+2400 …), lone surrogates as U+FFFD.

    Direction overrides become visible marks, so that one response cannot reorder the page around it.
    """
    out = []
    for character in text:
        code = ord(character)
        if code < 0x20 and character not in "\n\t":
            out.append(chr(0x2400 + code))
        elif 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):
            out.append("\ufffd")
        elif code in range(0x202A, 0x202F) or code in range(0x2066, 0x206A):
            out.append(f"⟨U+{code:04X}⟩")
        else:
            out.append(character)
    return "".join(out)


@dataclass(frozen=True)
class Picture:
    """An image as a data URI with its size on the page; ``pixelated``: small, so magnified without smoothing."""

    uri: str
    width: int
    height: int
    pixelated: bool


def picture(run: RunDirectory, digest: Any, problems: list[str]) -> Picture | None:
    """The image for the page, or None where the run directory lacks it (then named in ``problems``).

    Raises:
        ValueError: ``digest`` is not a SHA-256, or the file is not a PNG.
    """
    content = run.image(digest)
    if content is None:
        problems.append(f"rollouts/images/{digest[:12]}….png is missing.")
        return None
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError(f"rollouts/images/{digest}.png is not a PNG")
    size = struct.unpack(">II", content[16:24])
    if max(size) > _MAX_IMAGE_SIDE:
        return page_picture(Image.open(BytesIO(content)).convert("RGB"))
    return _picture(content, *size)


def page_picture(image: Image.Image) -> Picture:
    """An image for the page, scaled down where it is large."""
    image = image.copy()
    image.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _picture(buffer.getvalue(), *image.size)


def _picture(content: bytes, width: int, height: int) -> Picture:
    scale = max(1, min(192 // max(width, 1), 192 // max(height, 1)))
    uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return Picture(uri, width * scale, height * scale, pixelated=scale > 1)
