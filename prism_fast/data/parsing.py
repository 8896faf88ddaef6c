"""What the parsers of all formats share: the context of a row, and its images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from prism_fast.data.images import DEFAULT_MAX_IMAGE_PIXELS, image_source, load_image
from prism_fast.data.keys import image_key, image_values
from prism_fast.data.messages import IMAGE_MARKER, inline_images, prompt_messages
from prism_fast.data.problems import Place
from prism_fast.data.records import Records


@dataclass(frozen=True)
class Wanted:
    """Demands on samples beyond their format.

    ``require_teacher`` and ``known_sources`` (values of data_source that can be graded; None: any) of tasks;
    ``needs``: by value of data_source that cannot be graded, what it needs; the texts ``pair_texts`` of pairs.
    """

    require_teacher: bool = False
    known_sources: Collection[str] | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    pair_texts: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """How rows are read. ``system_prompt``: of rows without a system turn; None: such rows have none (pairs: the
    published one). ``image_root``: where relative image paths begin; None: the file's folder."""

    wanted: Wanted = field(default_factory=Wanted)
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: str | Path | None = None
    system_prompt: str | None = None
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class Context:
    """Of the rows of one file: ``columns`` maps our names to the file's; ``prefix`` begins the uids that are made here,
    ``own_prefix`` those of the rows; ``names_images``: whether `Pictures.names` are wanted."""

    records: Records
    settings: Settings
    columns: Mapping[str, str]
    prefix: str = ""
    own_prefix: str = ""
    names_images: bool = False

    @cached_property
    def root(self) -> Path:
        given = self.settings.image_root
        return Path(given) if given is not None else self.records.path.parent

    def named(self, record: dict[str, Any]) -> dict[str, Any]:
        """``record`` under our names."""
        if not self.columns:
            return record
        taken = set(self.columns.values()) | set(self.columns)
        renamed = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        return {key: value for key, value in record.items() if key not in taken} | renamed

    def uid(self, record: Mapping[str, Any], place: Place) -> str:
        """The record's own ``uid`` or ``id``, else the file's name and the row's number."""
        given = next((record[key] for key in ("uid", "id") if record.get(key) is not None), None)
        if isinstance(given, int) and not isinstance(given, bool):
            given = str(given)
        if given is not None:
            return self.own_prefix + place.text(given, "uid")
        return f"{self.prefix}{place.file.stem}-{place.row.split()[-1]}"


class Pictures:
    """The images of one row: checked at once, decoded by `load`. Of rows in tables nothing is kept; `load` reads their
    cell again."""

    def __init__(self, context: Context, place: Place, column: str, find: Callable[[Any], list], value: Any) -> None:
        """``find``: of the value of ``column``, the (field, image) pairs."""
        self._context, self._place, self._column, self._find = context, place, column, find
        found = [(field, image_source(image, place, field, context.root)) for field, image in find(value)]
        self._sources = found if context.records.schema is None else None
        self.count = len(found)
        # Rows of tasks are never divided; hashing their images would double the time of reading them.
        self.names = tuple(_name(source) for _, source in found) if context.names_images else ()

    def load(self) -> list[Image]:
        place, context = self._place, self._context
        sources = self._sources
        if sources is None:
            value = context.records.cell(int(place.row.split()[-1]), context.columns.get(self._column, self._column))
            sources = [(field, image_source(image, place, field, context.root)) for field, image in self._find(value)]
        return [load_image(source, place, field, context.settings.max_image_pixels) for field, source in sources]


class NoPictures:
    """Of a row without images."""

    count = 0
    names: tuple[str, ...] = ()

    def load(self) -> list[Image]:
        return []


def pictures_of(record: dict[str, Any], place: Place, context: Context, turns: str | None = None):
    """The images of a row: in a field of `IMAGE_KEYS`, or in typed parts of the field ``turns``.

    Raises:
        DataError: as `image_key` and `image_source`; or both hold images.
    """
    named = "images" in context.columns
    key = image_key(record, place, named=named)
    inline = inline_images(record.get(turns)) if turns is not None else []
    if inline:
        if key is not None and record[key]:
            raise place.error(key, f"holds images, and so do typed parts of '{turns}'", "Keep them in one place")
        return Pictures(
            context,
            place,
            turns,
            lambda value: [(f"{turns}{inside}", image) for inside, image in inline_images(value)],
            record[turns],
        )
    if key is None:
        return NoPictures()
    found = Pictures(context, place, key, lambda value: image_values(value, key, place, named=named), record[key])
    return found if found.count else NoPictures()


def flat_prompt(text: Any, images: int, place: Place, field: str) -> list[dict[str, Any]]:
    """The user turn of a format whose prompt is one text. Without any marker the images come first."""
    content = place.text(text, field)
    if IMAGE_MARKER not in content:
        content = IMAGE_MARKER * images + content
    return [{"role": "user", "content": content}]


def with_system(turns: list[dict[str, Any]], record: Mapping[str, Any], place: Place) -> list[dict[str, Any]]:
    """``turns`` with the row's own field ``system`` in front."""
    if not record.get("system"):
        return turns
    if turns and turns[0]["role"] == "system":
        raise place.error("system", "is given here and as the first turn", "Keep one")
    return [{"role": "system", "content": place.text(record["system"], "system")}, *turns]


def finished(turns: list[dict[str, Any]], images: int, place: Place, field: str, context: Context) -> list[dict]:
    """`prompt_messages`, with the recipe's system prompt where the row has none."""
    messages = prompt_messages(turns, images, place, field)
    system = context.settings.system_prompt
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _name(source: bytes | Path) -> str:
    return hashlib.sha256(source).hexdigest()[:24] if isinstance(source, bytes) else os.path.abspath(source)
