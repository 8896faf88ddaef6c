"""Sets of real numbers: intervals, their unions, inequalities, ℝ and ∅, compared by the set that they describe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_fast.rewards.compare.structure import split_outside, union_parts

_SIGN = re.compile(r"([<>≤≥≠])")
_NAME = re.compile(r"[A-Za-zα-ωΑ-Ω](?:_(?:[0-9a-zA-Z]|\{[0-9a-zA-Z]{1,5}\}))?|[A-Za-z]\([a-z]\)")
_OR = re.compile(r"\s*(?:\bor\b|或者|或|∨)\s*", re.IGNORECASE)
_MEMBER = re.compile(r"(?:([A-Za-zα-ω](?:_[0-9a-z])?)\s*∈\s*)(.+)")
_SET_BUILDER = re.compile(r"\\?\{\s*([A-Za-z])(?:\s*∈\s*ℝ)?\s*[|:]\s*(.+?)\s*\\?\}")
_INFINITE = re.compile(r"\+?∞|\+?(?:inf|infty|infinity|oo)", re.IGNORECASE)
_MARKS = re.compile(r"[<>≤≥≠∪∈ℝ]")


@dataclass(frozen=True)
class Interval:
    """From `low` to `high` (texts; `-∞`, `∞` without bound), with or without its ends."""

    low: str
    low_closed: bool
    high: str
    high_closed: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals; `name` is the variable that an inequality names, else empty."""

    name: str
    intervals: tuple[Interval, ...]


def describes_region(text: str) -> bool:
    """True when `text` has a sign that only sets of numbers have; brackets alone may be a point or a list."""
    return _MARKS.search(text) is not None


def is_empty_set(text: str) -> bool:
    return re.fullmatch(r"∅|\\\{\s*\\\}|\{\s*\}|空集|(?:the )?empty set", text, re.IGNORECASE) is not None


def read_region(text: str) -> Region | None:
    """The set that the whole of `text` describes, or None."""
    if len(text) > 300:
        return None
    if found := _SET_BUILDER.fullmatch(text):
        text = found[2]
    name = ""
    if found := _MEMBER.fullmatch(text):
        name, text = found[1], found[2]
    if text == "ℝ" or re.fullmatch("all real numbers|全体实数", text, re.IGNORECASE):
        return Region(name, (Interval("-∞", False, "∞", False),))
    names, intervals = {name} - {""}, []
    for part in _OR.split(text):
        for piece in union_parts(part):
            found = _bracketed(piece) if piece[:1] in "([" else None
            if found is None:
                read = _inequality(piece)
                if read is None:
                    return None
                names.add(read[0])
                intervals += read[1]
            else:
                intervals.append(found)
    if len(names) > 1 or not intervals:
        return None
    return Region(next(iter(names), ""), tuple(intervals))


def _bracketed(text: str) -> Interval | None:
    if text[-1:] not in ")]" or len(text) < 5:
        return None
    parts = [part.strip() for part in split_outside(text[1:-1], ",")]
    if len(parts) != 2 or not all(parts):
        return None
    low, high = (_end(part) for part in parts)
    return Interval(low, text[0] == "[" and low != "-∞", high, text[-1] == "]" and high != "∞")


def _end(text: str) -> str:
    if _INFINITE.fullmatch(text):
        return "∞"
    return "-∞" if text[:1] == "-" and _INFINITE.fullmatch(text[1:].lstrip()) else text


def _inequality(text: str) -> tuple[str, list[Interval]] | None:
    """(variable, intervals) of `x > 3`, `1 ≤ x < 3`, `x ≠ 2`."""
    pieces = [piece.strip() for piece in _SIGN.split(text)]
    sides, signs = pieces[::2], pieces[1::2]
    if not signs or len(signs) > 2 or not all(sides) or "=" in text:
        return None
    if len(signs) == 1:
        if signs[0] == "≠":
            name, value = sides if _NAME.fullmatch(sides[0]) else sides[::-1]
            if not _NAME.fullmatch(name) or not _constant(value):
                return None
            return name, [Interval("-∞", False, value, False), Interval(value, False, "∞", False)]
        if _NAME.fullmatch(sides[0]) and _constant(sides[1]):
            name, sign, value = sides[0], signs[0], sides[1]
        elif _NAME.fullmatch(sides[1]) and _constant(sides[0]):
            name, sign, value = sides[1], _mirror(signs[0]), sides[0]
        else:
            return None
        closed = sign in "≤≥"
        if sign in "<≤":
            return name, [Interval("-∞", False, _end(value), closed and _end(value) != "∞")]
        return name, [Interval(_end(value), closed and _end(value) != "-∞", "∞", False)]
    if not _NAME.fullmatch(sides[1]) or not (_constant(sides[0]) and _constant(sides[2])):
        return None
    if set(signs) <= set(">≥"):
        sides, signs = sides[::-1], [_mirror(sign) for sign in signs[::-1]]
    if not set(signs) <= set("<≤"):
        return None
    low, high = _end(sides[0]), _end(sides[2])
    return sides[1], [Interval(low, signs[0] == "≤" and low != "-∞", high, signs[1] == "≤" and high != "∞")]


def _mirror(sign: str) -> str:
    return {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}.get(sign, sign)


def _constant(text: str) -> bool:
    """A bound: anything but a list or another relation. `a > b` with two bare names is a relation, not a region."""
    return not _NAME.fullmatch(text) or text in ("e",) if "," not in text else False


def relation(text: str) -> tuple[str, str, str] | None:
    """(left, sign, right) of one relation, turned so that the sign is `<`, `≤` or `≠`."""
    pieces = [piece.strip() for piece in _SIGN.split(text)]
    if len(pieces) != 3 or not pieces[0] or not pieces[2] or "=" in text:
        return None
    left, sign, right = pieces
    if sign in ">≥":
        left, sign, right = right, _mirror(sign), left
    return left, sign, right
