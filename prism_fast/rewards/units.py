"""Units at the end of an answer: dimensions and conversion, so that `5 kg` is not `5 lb` and `1 m` is `100 cm`.

A unit has a dimension (base quantities with powers), an exact scale to the base unit of that dimension and, for
temperatures, an offset. Units that merely count things (`pieces`, `个`) share the generic dimension `count` and agree
with each other and with every specific count (`people`); two different specific counts do not agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """`base value = value · scale + offset`; `dimension` is sorted (quantity, power) pairs."""

    dimension: Dimension
    scale: Fraction
    offset: Fraction = Fraction(0)

    def agrees(self, other: Unit) -> bool:
        """True when values in both units can be compared: equal dimensions, or both counts of which one is generic."""
        if self.dimension == other.dimension:
            return True
        counts = [unit.dimension[0][0] for unit in (self, other) if len(unit.dimension) == 1]
        return len(counts) == 2 and all(name.startswith("count") for name in counts) and "count" in counts


def _table(rows: str) -> dict[str, Unit]:
    units = {}
    for row in rows.strip().splitlines():
        quantity, scale, names = (cell.strip() for cell in row.split("|"))
        name, _, power = quantity.partition("^")
        for alias in names.split(","):
            units[alias.strip()] = Unit(((name, int(power or 1)),), Fraction(scale))
    return units


_UNITS = _table(
    """
    length | 1 | meter, meters, metre, metres, 米
    length | 1/100 | cm, centimeter, centimeters, centimetre, centimetres, 厘米
    length | 1/1000 | mm, millimeter, millimeters, millimetre, millimetres, 毫米
    length | 1/10 | dm, decimeter, decimeters, decimetre, decimetres, 分米
    length | 1000 | km, kilometer, kilometers, kilometre, kilometres, 千米, 公里
    length | 254/10000 | inch, inches
    length | 3048/10000 | foot, feet, ft
    length | 9144/10000 | yard, yards, yd
    length | 1609344/1000 | mile, miles
    length^2 | 1 | 平方米
    length^2 | 1/10000 | 平方厘米
    mass | 1 | gram, grams, 克
    mass | 1000 | kg, kilogram, kilograms, 千克, 公斤
    mass | 1/1000 | mg, milligram, milligrams
    mass | 45359237/100000 | lb, lbs, pound, pounds
    mass | 28349523125/1000000000 | oz, ounce, ounces
    mass | 1000000 | tonne, tonnes
    time | 1 | second, seconds, sec, secs, 秒
    time | 60 | minute, minutes, min, mins, 分钟
    time | 3600 | hour, hours, hr, hrs, 小时
    time | 86400 | day, days, 天
    time | 604800 | week, weeks
    month | 1 | month, months
    year | 1 | year, years
    length^3 | 1/1000 | liter, liters, litre, litres, 升
    length^3 | 1/1000000 | ml, milliliter, milliliters, millilitre, millilitres, 毫升
    angle | 1 | °, degree, degrees, deg, 度
    radian | 1 | rad, radian, radians
    percent | 1 | %, percent
    currency:dollar | 1 | dollar, dollars, usd
    currency:dollar | 1/100 | cent, cents
    currency:yuan | 1 | yuan, rmb, 元
    currency:euro | 1 | euro, euros
    count | 1 | piece, pieces, item, items, 个, 张, 块, 条
    count:time | 1 | times, 次
    count:person | 1 | person, people, persons, 人
    count:student | 1 | student, students
    count:plate | 1 | plate, plates
    """
)
_UNITS["°c"] = _UNITS["celsius"] = _UNITS["°celsius"] = _UNITS["℃"] = Unit((("temperature", 1),), Fraction(1))
_UNITS["°f"] = _UNITS["fahrenheit"] = _UNITS["℉"] = Unit((("temperature", 1),), Fraction(5, 9), Fraction(-160, 9))
# A single letter is a unit only in this case and when set apart (`8 m`, `8\text{m}`); right after a number it is a
# variable.
_LETTERS = {
    "m": _UNITS["meter"],
    "g": _UNITS["gram"],
    "s": _UNITS["second"],
    "h": _UNITS["hour"],
    "L": _UNITS["liter"],
    "l": _UNITS["liter"],
}
_PREFIXES = {"$": "dollar", "\\$": "dollar", "US$": "dollar", "¥": "yuan", "￥": "yuan", "€": "euro"}

_NAMES = "|".join(sorted((re.escape(name) for name in _UNITS), key=len, reverse=True))
_POWER = r"(?:\s*\^\s*\{?\s*([23])\s*\}?|([²³])|([23]))?"
_FACTOR = re.compile(rf"(?:({_NAMES})(?![a-z])|([mgshLl])(?![a-zA-Z])){_POWER}", re.IGNORECASE)
_TAIL = re.compile(
    r"\s*(?:\\(?:text|mathrm|rm|operatorname)\s*\{\s*)?"
    rf"(?P<unit>(?:square |cubic |sq\.? )?(?:{_NAMES}|(?<=[\s{{])[mgshLl]){_POWER}\s*\}}?{_POWER}"
    rf"(?:\s*(?:/|\bper\b|每)\s*(?:\\(?:text|mathrm|rm)\s*\{{)?\s*(?:{_NAMES}|[mgshLl]){_POWER}\s*\}}?{_POWER})?)\.?$",
    re.IGNORECASE,
)
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:circ|degree)(?![a-zA-Z])|[˚º])")
_SCALE_LETTER = re.compile(r"°\s*(?:\\(?:text|mathrm|rm)\s*\{\s*)?([CF])\s*\}?$")
# A trailing plural noun names the things counted ("3 apples"), unless it changes the value ("3 dozens", "2 thirds", "4
# millions").
_COUNTED = re.compile(r"(?<=[0-9]) ((?:[a-z]{3,} )?[a-z]{3,}s)$")
_CHANGES_VALUE = re.compile(
    r"tens|dozens|scores|hundreds|thousands|millions|billions|trillions|halves|pairs|couples|percents|cubes|squares|roots|powers|logs|"
    r".*(?:th|third|quarter|half)s|(?:a|an|and|or|is|plus|minus|over|not|more|less|fewer|under|than)\b.*|(?:ten|dozen|hundred|thousand|million|billion|trillion|pair)\b.*"
)


def split_unit(text: str) -> tuple[str, Unit | None]:
    """(`text` without its unit, the unit), or (`text`, None) when no unit is recognised. `text` must be cleaned."""
    text = _SCALE_LETTER.sub(r"°\1", _DEGREE.sub("°", text)).replace("\\%", "%")
    for prefix, name in _PREFIXES.items():
        sign = "-" if text.startswith("-") else ""
        if text[len(sign) :].startswith(prefix) and text[len(sign) + len(prefix) :].lstrip()[:1].isdigit():
            return sign + text[len(sign) + len(prefix) :].strip(), _UNITS[name]
    found = _TAIL.search(text)
    if found and found.start() > 0 and _may_carry_unit(text[: found.start()], text[found.start() : found.end()]):
        unit = _read(found["unit"])
        if unit is not None:
            return text[: found.start()].rstrip(), unit
    found = _COUNTED.search(text)
    if found and not _CHANGES_VALUE.fullmatch(found[1]):
        return text[: found.start()].rstrip(), Unit(((f"count:{found[1].rstrip('s')}", 1),), Fraction(1))
    return text, None


def _may_carry_unit(core: str, tail: str) -> bool:
    """A unit follows a digit, a closing bracket or, set apart, a single symbol; never a function (`\\sin 30°` keeps its
    degree sign)."""
    if re.search(r"\\?(?:sin|cos|tan|cot|sec|csc|log|ln)(?![a-z])", core) or core.endswith("\\"):
        return False
    if core[-1] in "0123456789.)}]":
        return True
    return tail[0] in " \\" and re.search(r"(?:^|[^a-zA-Z])[a-zA-Zπ]$|\\pi$", core) is not None


def _read(text: str) -> Unit | None:
    dimension: dict[str, int] = {}
    scale, offset, sign = Fraction(1), Fraction(0), 1
    parts = re.split(r"/|\bper\b|每", re.sub(r"\\(?:text|mathrm|rm)|[{}]", "", text))
    for part in parts:
        part = part.strip()
        worded = re.match(r"(square|sq\.?|cubic) ", part, re.IGNORECASE)
        power = 1
        if worded:
            power = 3 if worded[1].lower() == "cubic" else 2
            part = part[worded.end() :]
        found = _FACTOR.fullmatch(part)
        if found is None:
            return None
        if found[3] or found[4] or found[5]:
            power *= int({"²": "2", "³": "3"}.get(found[4] or "", found[3] or found[5] or "1"))
        unit = _LETTERS.get(found[2]) if found[2] else _UNITS[found[1].lower()]
        if unit is None or (unit.offset and (power != 1 or len(parts) > 1)):
            return None
        for quantity, base_power in unit.dimension:
            dimension[quantity] = dimension.get(quantity, 0) + sign * power * base_power
        scale *= unit.scale ** (sign * power)
        offset, sign = unit.offset, -1
    return Unit(tuple(sorted((name, power) for name, power in dimension.items() if power)), scale, offset)
