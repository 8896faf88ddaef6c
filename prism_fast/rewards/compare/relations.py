"""Equations, inequalities, sets of numbers and conditions."""

from __future__ import annotations

import re
from fractions import Fraction

from prism_fast.rewards.compare import regions
from prism_fast.rewards.compare.formulas import formulas
from prism_fast.rewards.compare.measures import multiple_of_pi
from prism_fast.rewards.compare.numbers import parse_number
from prism_fast.rewards.compare.structure import equality_chain, is_name, listings
from prism_fast.rewards.compare.words import squeeze
from prism_fast.rewards.verdict import Inner, Verdict, all_of

_CONDITION = re.compile(
    r"\s*(?:,\s*|\(\s*|\bwhere\s+|\bwith\s+|\bfor\s+|其中)(?:all\s+)?"
    r"([a-zA-Z][^(),]{0,20}?[∈≠<>≤≥][^()]{1,40}?)\s*\)?\s*$"
)
_MAX_SIDES = 16


def condition(gold: str, answer: str, inner: Inner) -> Verdict | None:
    """`…, k ∈ ℤ`: the condition is part of the answer."""
    found = [_CONDITION.search(text) for text in (gold, answer)]
    sides = zip((gold, answer), found, strict=True)
    cores = [text[: match.start()].strip() if match else text for text, match in sides]
    if not any(found) or not all(cores):
        return None
    if any(regions.describes_region(core) for core in cores):
        return None
    if found[0] is None or found[1] is None:
        return Verdict(False, "condition")
    if squeeze(found[0][1]) != squeeze(found[1][1]):
        return Verdict(False, "condition")
    return inner(*cores)


def region(gold: str, answer: str, inner: Inner) -> Verdict | None:
    empty = regions.is_empty_set(gold), regions.is_empty_set(answer)
    if any(empty):
        return Verdict(all(empty), "region")
    if not regions.describes_region(gold) and not regions.describes_region(answer):
        return None
    sets = regions.read_region(gold), regions.read_region(answer)
    if sets[0] is None or sets[1] is None:
        return _relation(gold, answer, inner)
    if sets[0].name and sets[1].name and sets[0].name != sets[1].name:
        return Verdict(False, "region")
    one, other = (sorted(region.intervals, key=_place) for region in sets)
    if len(one) != len(other):
        return Verdict(False, "region")
    verdicts = []
    for left, right in zip(one, other, strict=True):
        if (left.low_closed, left.high_closed) != (right.low_closed, right.high_closed):
            return Verdict(False, "region")
        verdicts += [inner(left.low, right.low), inner(left.high, right.high)]
    return all_of(verdicts, "region")


def _place(interval: regions.Interval) -> tuple[int, Fraction, int, Fraction]:
    return (*_position(interval.low), *_position(interval.high))


def _position(bound: str) -> tuple[int, Fraction]:
    if bound in ("-∞", "∞"):
        return (-1 if bound == "-∞" else 1, Fraction(0))
    number = parse_number(bound)
    if number is None and (value := multiple_of_pi(bound)) is not None:
        return 0, value * 3
    if number is None:
        return (0, Fraction(-(10**9))) if bound.startswith("-") else (0, Fraction(10**9))
    return 0, number.value


def _relation(gold: str, answer: str, inner: Inner) -> Verdict | None:
    one, other = regions.relation(gold), regions.relation(answer)
    if one is None and other is None:
        return None
    if one is None or other is None or one[1] != other[1]:
        return Verdict(False, "relation")
    turned = one[0], one[1], one[2]
    pairs = [(turned[0], other[0]), (turned[2], other[2])]
    if one[1] == "≠" and squeeze(one[0]) == squeeze(other[2]):
        pairs = [(one[0], other[2]), (one[2], other[0])]
    return all_of((inner(*pair) for pair in pairs), "relation")


def equation(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_sides, answer_sides = equality_chain(gold), equality_chain(answer)
    if len(gold_sides) == 1 and len(answer_sides) == 1:
        return None
    if len(gold_sides) + len(answer_sides) > _MAX_SIDES:
        return Verdict(False, "too_complex")
    if "" in gold_sides + answer_sides or _listed(gold) or _listed(answer):
        return None
    gold_sides, answer_sides = _name_first(gold_sides), _name_first(answer_sides)
    if len(gold_sides) == 2 and len(answer_sides) == 2:
        (gold_name, gold_value), (answer_name, answer_value) = gold_sides, answer_sides
        if is_name(gold_name) and squeeze(gold_name) == squeeze(answer_name):
            return inner(gold_value, answer_value)
        if is_name(gold_name) and is_name(answer_name) and not re.search("[A-Za-z]", gold_value + answer_value):
            return Verdict(False, "equation")
        return formulas(gold, answer) or Verdict(False, "equation")
    if len(gold_sides) > 1 and not is_name(gold_sides[0]):
        return (formulas(gold, answer) if len(answer_sides) == 2 else None) or Verdict(False, "equation")
    value = gold_sides[-1]
    named = [side for side in answer_sides if not is_name(side)] or answer_sides[-1:]
    if len(gold_sides) > 1 and len(answer_sides) > 1 and is_name(answer_sides[0]):
        if squeeze(answer_sides[0]) != squeeze(gold_sides[0]):
            return Verdict(False, "equation")
    if ":" in value and not any(":" in side for side in named):
        named = answer_sides[-1:]
    return all_of((_side(value, side, inner) for side in named), "equation")


def _side(value: str, side: str, inner: Inner) -> Verdict:
    """One side of a chain of equalities: `8-3` in it is arithmetic, not a range."""
    if re.fullmatch(r"[0-9.]+\s*-\s*[0-9.]+", side):
        side = side.replace("-", " + -")
        return formulas(value, side) or Verdict(False, "equation")
    return inner(value, side)


def _name_first(sides: list[str]) -> list[str]:
    """`5 = x` as `x = 5`."""
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        return sides[::-1]
    return sides


def _listed(text: str) -> bool:
    """True when `text` is a list even if thousands groups are kept together."""
    return len(listings(text)[0].parts) > 1
