"""The outer structure of an answer: lists, brackets, unions, chains of equalities. Brackets are never dropped, so
`(0,1)` is not `[0,1]`."""

from __future__ import annotations

import re

_MARKER = re.compile(r"\(\s*[0-9]{1,2}\s*\)\s*")
_CONJUNCTION = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|和|或)\s*")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:[A-Za-z '_{}]|\\[A-Za-z]+|(?<=[A-Za-z_{}])[0-9])*(?:\([A-Za-z]\))?")
_OPENING, _CLOSING = "([{", ")]}"


def list_readings(text: str) -> list[list[str]]:
    """The ways to read `text` as a list; one reading of one part when it is no list.

    `1,234` without a space can be one number or two values, so both readings are given, the one that keeps thousands
    groups first.
    """
    markers = list(_MARKER.finditer(text))
    if len(markers) >= 2 and markers[0].start() == 0:
        ends = [marker.start() for marker in markers[1:]] + [len(text)]
        return [_parts(text[marker.end() : end] for marker, end in zip(markers, ends, strict=True))]
    by_semicolon = _parts(_split(text, ";"))
    if len(by_semicolon) > 1:
        return [by_semicolon]
    readings = []
    for keep_thousands in (True, False):
        parts = _parts(_split(text, ",", keep_thousands))
        if (
            parts
            and (found := list(_CONJUNCTION.finditer(parts[-1])))
            and all(re.search(r"[0-9]", part) for part in parts)
        ):
            last = parts.pop()
            parts += _parts([last[: found[-1].start()], last[found[-1].end() :]])
        if parts and parts not in readings:
            readings.append(parts)
    return readings or [[text]]


def _parts(parts) -> list[str]:
    return [part for part in (part.strip().strip(",;").strip() for part in parts) if part]


def _split(text: str, separator: str, keep_thousands: bool = False) -> list[str]:
    """Pieces of `text` between separators outside all brackets; unbalanced closing brackets never make the depth
    negative."""
    kept = {found.start() for found in _THOUSANDS.finditer(text)} if keep_thousands else set()
    pieces, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)
        elif depth == 0 and index not in kept and text.startswith(separator, index):
            pieces.append(text[start:index])
            start = index + len(separator)
    return [*pieces, text[start:]]


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) when one pair of brackets encloses the whole text; `\\{` counts as `{`, mixed pairs
    such as `(…]` are intervals."""
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\{", "{").replace("\\}", "}")
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and index < len(text) - 1:
            return None
    return (text[0], text[1:-1].strip(), text[-1]) if depth == 0 else None


def union_parts(text: str) -> list[str]:
    """The pieces of a union of sets (`∪`, `\\cup`, or a `U` between brackets); one piece when it is no union."""
    text = re.sub(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*U\s*(?=[(\[{\\])", "∪", text)
    return _parts(_split(text, "∪"))


def equality_chain(text: str) -> list[str]:
    """The sides of `a = b = …`; one side when there is no plain equality sign outside brackets."""
    masked = re.sub(
        r"[<>!]=|==|=[<>]|\\[a-z]+=",
        lambda found: found[0] if found[0].startswith("\\") else "\0" * len(found[0]),
        text,
    )
    sides, position = [], 0
    for piece in _split(masked, "="):
        sides.append(text[position : position + len(piece)].strip())
        position += len(piece) + 1
    return sides


def is_name(text: str) -> bool:
    """True for what may be named on the left of `=`: a variable, a label, a short phrase, `f(x)`; never a number or an
    operation."""
    return _NAME.fullmatch(text) is not None
