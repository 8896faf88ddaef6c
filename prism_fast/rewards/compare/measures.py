"""Quantities, angles, ratios, moments and infinity, compared by what they measure."""

from __future__ import annotations

import re
from fractions import Fraction

from prism_fast.rewards.compare.moments import may_be_ratio, read_moment
from prism_fast.rewards.compare.numbers import parse_number
from prism_fast.rewards.compare.quantities import ANGLE, read_quantities, same_quantity, split_unit
from prism_fast.rewards.compare.structure import is_list
from prism_fast.rewards.compare.units import Unit
from prism_fast.rewards.compare.words import prose
from prism_fast.rewards.verdict import Inner, Verdict, all_of

_INFINITY = re.compile(r"([-+]?)\s*(?:∞|inf|infinity|oo)", re.IGNORECASE)


def moment(gold: str, answer: str, inner: Inner) -> Verdict | None:
    moments = read_moment(gold), read_moment(answer)
    if moments[0] is None and moments[1] is None:
        return None
    if moments[0] is not None and moments[1] is not None:
        return Verdict(moments[0] == moments[1], "moment")
    text = answer if moments[0] is None else gold
    return None if may_be_ratio(text) else Verdict(False, "moment")


def quantity(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_readings, answer_readings = read_quantities(gold), read_quantities(answer)
    if gold_readings and answer_readings:
        pairs = [(one, other) for one in gold_readings for other in answer_readings]
        with_units = any(reading.unit for reading in (*gold_readings, *answer_readings))
        if any(same_quantity(*pair) for pair in pairs):
            return Verdict(True, "unit" if gold_readings[0].unit != answer_readings[0].unit else "number")
        if not with_units and (is_list(gold) or is_list(answer)):
            return None  # "1,234" may also be two values: the list rule decides
        return Verdict(False, "unit" if with_units else "number")
    if not gold_readings and not answer_readings and prose(gold) and prose(answer):
        return None
    if re.search("[=<>≤≥≠∈]", gold + answer):
        return None  # the sides of relations have units of their own
    (gold_core, gold_unit), (answer_core, answer_unit) = split_unit(gold), split_unit(answer)
    if gold_unit is None and answer_unit is None:
        return None
    if gold_unit and answer_unit and not gold_unit.agrees(answer_unit):
        return _radians(gold_core, gold_unit, answer_core, answer_unit) or Verdict(False, "unit")
    if gold_unit and answer_unit and (gold_unit.scale, gold_unit.offset) != (answer_unit.scale, answer_unit.offset):
        return Verdict(False, "unit")
    if bool(gold_unit) != bool(answer_unit):
        angle = _radians(gold_core, gold_unit, answer_core, answer_unit)
        if angle is not None:
            return angle
    if is_list(gold) or is_list(answer):
        return None
    return inner(gold_core, answer_core)


def _radians(gold: str, gold_unit: Unit | None, answer: str, answer_unit: Unit | None) -> Verdict | None:
    """Degrees against exact multiples of π (`30°` is `\\frac{π}{6}`)."""
    sides = []
    for text, unit in ((gold, gold_unit), (answer, answer_unit)):
        number = parse_number(text)
        if unit is not None and unit.dimension == ANGLE and number is not None:
            sides.append(number.value / 180)
        elif (unit is None or unit.dimension == (("[radian_angle]", 1),)) and "π" in text:
            sides.append(multiple_of_pi(text))
        else:
            return None
    if None in sides or gold_unit == answer_unit:
        return None
    return Verdict(sides[0] == sides[1], "unit")


def multiple_of_pi(text: str) -> Fraction | None:
    """`\\frac{5π}{6}`, `2π/3`, `\\frac{1}{2}π` as a multiple of π."""
    text = re.sub(r"[\s·*×]", "", text)
    if text.count("π") != 1:
        return None
    text = re.sub(r"(?<=[0-9}])π", "", text).replace("π", "1")
    if found := re.fullmatch(r"(-?)([0-9]*)(\\frac\{[0-9]+\}\{[0-9]+\})", text):
        if found[2]:
            return None
    number = parse_number(text)
    return None if number is None else number.value


def ratio(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_parts, answer_parts = (_ratio_parts(text) for text in (gold, answer))
    if len(gold_parts) == 1 and len(answer_parts) == 1:
        return None
    if not all(gold_parts + answer_parts):
        return Verdict(False, "ratio")
    if len(gold_parts) != len(answer_parts):
        if {len(gold_parts), len(answer_parts)} != {1, 2}:
            return Verdict(False, "ratio")
        values = [_quotient(parts) for parts in (gold_parts, answer_parts)]
        if None in values:
            return Verdict(False, "ratio")
        return Verdict(values[0] == values[1], "ratio")
    numbers = [[parse_number(part) for part in parts] for parts in (gold_parts, answer_parts)]
    if all(number is not None and number.value for side in numbers for number in side):
        first = numbers[0][0].value / numbers[1][0].value
        return Verdict(all(one.value == first * other.value for one, other in zip(*numbers, strict=True)), "ratio")
    return all_of((inner(*pair) for pair in zip(gold_parts, answer_parts, strict=True)), "ratio")


def _ratio_parts(text: str) -> list[str]:
    if found := re.fullmatch(r"([0-9.]+) to ([0-9.]+)|([0-9.]+)比([0-9.]+)", text):
        return [part for part in found.groups() if part]
    return [part.strip() for part in text.split(":")]


def _quotient(parts: list[str]) -> Fraction | None:
    numbers = [parse_number(part) for part in parts]
    if None in numbers or (len(numbers) == 2 and not numbers[1].value):
        return None
    return numbers[0].value / numbers[1].value if len(numbers) == 2 else numbers[0].value


def infinity(gold: str, answer: str, inner: Inner) -> Verdict | None:
    found = [_INFINITY.fullmatch(text) for text in (gold, answer)]
    if found[0] and found[1]:
        return Verdict((found[0][1] or "+") == (found[1][1] or "+"), "infinity")
    return Verdict(False, "infinity") if any(found) else None
