"""Errors about users' files: they name file, row and field, the fault, and the cure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MAX_SHOWN = 600  # characters of a message; a quoted value can be a megabyte long
# What differs between problems of one kind: quoted values, remarks in brackets, paths, numbers.
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\S*[/\\]\S*|\d[\d.,]*")
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|image_pad|video_pad)\|>")
_SPECIAL = re.compile(r"<\|(?:(?:object_ref|box|quad)_(?:start|end)|vision_pad)\|>")


def holds_control_token(text: str) -> bool:
    """Whether ``text`` spells a control token of the chat format; the readers refuse such texts."""
    return _CONTROL.search(text) is not None


class DataError(ValueError):
    """A file or sample cannot be used. ``str()`` is one sentence for a terminal, naming the place and the cure.

    Attributes:
        reason: the kind under which omitted samples are counted.
        place, field: where it is; ``field`` may be empty.
        about: the same sentence without the place.
        kind: equal for problems that differ in rows, names and numbers alone.
    """

    reason = "bad"

    def __init__(self, place: Place, field: str, wrong: str, cure: str) -> None:
        where = f"{place.file}, {place.row}" if place.row else str(place.file)
        says = f"{' '.join(wrong.split())[:_MAX_SHOWN]}. {cure}."
        self.place, self.field = place, field
        self.about = _shown(f"field '{field}': {says}" if field else says)
        self.kind = (re.sub(r"\[\d+\]", "", field), _DETAIL.sub("…", says))
        super().__init__(f"{_shown(where)}: {self.about}")


class ImageError(DataError):
    """An image is missing, damaged, too large or of an unsupported kind."""

    reason = "image"


class LongPromptError(DataError):
    """An expanded prompt is longer than the limit."""

    reason = "long"


@dataclass(frozen=True)
class Place:
    """Where a value is: a file and, inside it, ``row`` ("row 3", counted from 0, or "line 4", counted from 1)."""

    file: Path
    row: str = ""

    def error(self, field: str, wrong: str, cure: str, *, kind: type[DataError] = DataError) -> DataError:
        return kind(self, field, wrong, cure)

    def text(self, value: object, field: str, *, empty: bool = False) -> str:
        """``value`` if it is a (non-empty, unless ``empty``) string that can be tokenised as plain text.

        Control tokens of the chat format are refused: inside a text they would open turns or pose as images.
        """
        if not isinstance(value, str):
            raise self.error(field, f"is {_kind(value)}, wanted a string", "Write the value as text")
        if not empty and not any(character.isprintable() and not character.isspace() for character in value):
            raise self.error(field, "is empty", "Fill it in or leave the row out")
        control = _CONTROL.search(value)
        if control:
            raise self.error(field, f"holds the control token {control[0]}", "Remove it: texts are plain text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(field, f"is not valid Unicode ({error.reason})", "Save the text as UTF-8") from error
        return value

    def response(self, value: object, field: str) -> str:
        """`text` of a response that is trained on or scored. Special tokens of Qwen's grounding format are refused: in
        a prompt they are one id each, but a response is encoded as plain letters and decoded without special tokens.
        """
        text = self.text(value, field)
        if special := _SPECIAL.search(text):
            wrong = f"holds the special token {special[0]}, which would be trained as plain letters"
            raise self.error(field, wrong, "Write the position in words or JSON: responses are plain text")
        return text

    def listing(self, value: object, field: str) -> list:
        """``value`` if it is a list."""
        if not isinstance(value, list):
            raise self.error(field, f"is {_kind(value)}, wanted a list", "Put the value into a list, also a single one")
        return value

    def mapping(self, value: object, field: str) -> dict:
        """``value`` if it is an object with named fields."""
        if not isinstance(value, dict):
            raise self.error(field, f"is {_kind(value)}, wanted an object with named fields", "Write {name: value, …}")
        return value


def _shown(message: str) -> str:
    """``message`` made safe for a terminal: values of a file may hold control characters."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in message)


def _kind(value: object) -> str:
    return "missing (null)" if value is None else f"of type {type(value).__name__}"


def by_kind(problems: Iterable[DataError]) -> list[list[DataError]]:
    """``problems`` of one kind together, in the order of their first ones."""
    found: dict[tuple[str, str], list[DataError]] = {}
    for problem in problems:
        found.setdefault(problem.kind, []).append(problem)
    return list(found.values())
