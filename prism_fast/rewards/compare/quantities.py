"""Quantities: a number with what it measures or counts, as all the readings that a text allows.

`25K` is twenty-five thousand or 25 kelvin, `1,234` a number (or a list, which is another rule's business); two texts
agree when any two of their readings do. A reading is the whole text or nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_fast.rewards.compare.number_words import leading_words
from prism_fast.rewards.compare.numbers import Number, leading_number, parse_number, same_number
from prism_fast.rewards.compare.units import LETTERS, MONEY, Unit, counted, counter, leading_unit, read_unit

PERCENT = (("[percentage]", 1),)
ANGLE = (("[plane_angle]", 1),)

_MAGNITUDES = {
    **dict.fromkeys(("thousand", "千"), 10**3),
    **dict.fromkeys(("million", "mln", "百万"), 10**6),
    **dict.fromkeys(("billion", "bn", "十亿"), 10**9),
    **dict.fromkeys(("trillion",), 10**12),
    **{"hundred": 100, "百": 100, "万": 10**4, "十万": 10**5, "千万": 10**7, "亿": 10**8, "万亿": 10**12, "dozen": 12},
}
_ATTACHED = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MAGNITUDE = re.compile(rf"\s*({'|'.join(sorted(_MAGNITUDES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_LETTER = re.compile(r"([kKMBT])(?![A-Za-z])")
_SIGNS = "|".join(re.escape(sign) for sign in sorted(MONEY, key=len, reverse=True))
_MONEY = re.compile(rf"([-+]?)\s*({_SIGNS})\s*([-+]?)\s*(?=[0-9.])")
_UNIT_FRACTION = re.compile(r"\\frac\s*\{([A-Za-zΩμ0-9^ ·]+)\}\s*\{([A-Za-zΩμ0-9^ ·]+)\}")
_NOUNS = re.compile(r"[A-Za-z][a-z]+(?:[ -][A-Za-z][a-z]*)*(?:\([a-z]+\))?")
# What turns "3 …" into another number, a condition or a negation.
_NO_THING = frozenset(
    "tens dozen dozens score scores hundred hundreds thousand thousands million millions billion billions "
    "trillion trillions half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths "
    "seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths "
    "percent percents percentage squared cubed root roots power powers log logs factorial a an or is are was plus "
    "minus times over not no more less fewer under than of from to per by if else for but each every with without "
    "between out except wrong maybe at least most ago am pm mod degrees degree only false true nor either neither "
    "before after above below am because therefore so equals equal divided multiplied".split()
)
_BEFORE_A_UNIT = re.compile(r"(?<=[0-9})πa-zA-Z])\s+(?=\S)|(?<=[0-9})π])(?=[a-zA-Z°%Ω¤元])")
_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "feet": "foot",
              "geese": "goose", "teeth": "tooth", "oxen": "ox", "knives": "knife", "leaves": "leaf", "shelves": "shelf",
              "wolves": "wolf", "loaves": "loaf", "lives": "life"}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """`number` of `unit` (None: a bare number). `lonely`: the unit may not be left out, because it is a single
    letter right after the number, which may be a variable, or because there are several (`1 h 30 min`)."""

    number: Number
    unit: Unit | None
    lonely: bool = False


def read_quantities(text: str) -> tuple[Quantity, ...]:
    """All readings of `text` (normalised) as one quantity; empty when it is none."""
    if (number := parse_number(text)) is not None:
        return (Quantity(number, None),)
    if not text or len(text) > 120:
        return ()
    money = _MONEY.match(text)
    if money:
        body = (money[1] or money[3]) + text[money.end() :]
        unit = leading_unit(money[2])
        inner = read_quantities(body) if unit else ()
        return tuple(
            Quantity(found.number, unit[0]) for found in inner if found.unit in (None, unit[0]) and not found.lonely
        )
    start = leading_number(text) or _worded(text)
    if start is None:
        return ()
    return tuple(_rest(start[0], text[start[1] :], text)) or _compound(text)


def _worded(text: str) -> tuple[Number, int] | None:
    percent = text.startswith("百分之")
    found = leading_words(text[3:] if percent else text)
    if percent and found is None and (number := leading_number(text[3:])):
        found = number[0].value, number[1]
    if found is None:
        return None
    value, end = found
    return (Number(value / 100, False), end + 3) if percent else (Number(value, False), end)


def _rest(number: Number, rest: str, text: str):
    """Readings of what follows a number."""
    if rest == "":
        yield Quantity(number, None)
        return
    if magnitude := _MAGNITUDE.match(rest):
        factor = _MAGNITUDES[magnitude[1].lower()]
        yield from _rest(_times(number, factor), rest[magnitude.end() :], text)
        yield from _named(number, rest, False)
        return
    if letter := _LETTER.match(rest):
        yield from _named(_times(number, _ATTACHED[letter[1]]), rest[1:], False)
    yield from _named(number, rest, rest[0] in LETTERS and len(rest) == 1)


def _named(number: Number, rest: str, lonely: bool):
    name = rest.strip().rstrip(".")
    if not name:
        yield Quantity(number, None)
        return
    if name[:1] == "-" and rest[:1] == "-":  # "5-inch"
        name = name[1:].lstrip()
    name = name[1:-1].strip() if name[:1] == "(" and name[-1:] == ")" else name
    name = _UNIT_FRACTION.sub(r"\1/(\2)", name)
    if unit := read_unit(name):
        yield Quantity(number, unit, lonely)
    elif found := counter(name):
        kind, things = found
        yield Quantity(number, counted(things) if kind == "count" else Unit(((kind, 1),)))
    elif things := read_things(name):
        yield Quantity(number, counted(things))


def _times(number: Number, factor: int) -> Number:
    return Number(number.value * factor, number.decimal)


def _compound(text: str) -> tuple[Quantity, ...]:
    """`1 h 30 min`, `5 ft 6 in`: units of one dimension, each smaller than the one before, no part as large as one of
    the unit before."""
    total, decimal, units, position = Fraction(0), False, [], 0
    while position < len(text) and len(units) < 4:
        found = leading_number(text[position:])
        if found is None or found[0].value < 0:
            return ()
        number, end = found
        position += end + len(text[position + end :]) - len(text[position + end :].lstrip())
        unit = leading_unit(text[position:])
        if unit is None and units and text[position:].startswith("分") and units[-1].dimension == (("[time]", 1),):
            unit = leading_unit("分钟")
            position -= 1
        if unit is None or (units and (unit[0].dimension != units[-1].dimension or unit[0].scale >= units[-1].scale)):
            return ()
        if unit[0].offset or (units and number.value * unit[0].scale >= units[-1].scale):
            return ()
        total += number.value * unit[0].scale
        decimal |= number.decimal
        units.append(unit[0])
        position += unit[1]
        while text[position : position + 1] in (" ", ","):
            position += 1
        if text.startswith("and ", position):
            position += 4
    if len(units) < 2 or position < len(text):
        return ()
    return (Quantity(Number(total / units[0].scale, decimal), units[0], lonely=True),)


def read_things(text: str) -> str | None:
    """The words, in the singular, of a phrase that names counted things ("small red cubes"), or None."""
    if not _NOUNS.fullmatch(text):
        return None
    words = re.findall("[a-z]+", text.lower())
    if len(words) > 5 or (len(words[-1]) < 3 and words[-1] != "ox") or any(word in _NO_THING for word in words):
        return None
    return " ".join(_singular(word) for word in words if word not in ("the", "in", "total"))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search("(?:x|ch|sh|ss)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two readings are the same answer: units convert, one side may leave its unit out, and a percentage may
    also be its hundredth."""
    if gold.unit and answer.unit:
        if not gold.unit.agrees(answer.unit):
            return False
        return same_number(_in_base(gold), _in_base(answer))
    if gold.lonely or answer.lonely:
        return False
    if not any(_is_permille(quantity) for quantity in (gold, answer)) and same_number(gold.number, answer.number):
        return True
    percent = [quantity.unit is not None and quantity.unit.dimension == PERCENT for quantity in (gold, answer)]
    return any(percent) and same_number(_share(gold), _share(answer))


def _is_permille(quantity: Quantity) -> bool:
    return quantity.unit is not None and quantity.unit.dimension == PERCENT and quantity.unit.scale != 1


def _in_base(quantity: Quantity) -> Number:
    unit, number = quantity.unit, quantity.number
    return Number(number.value * unit.scale + unit.offset, number.decimal) if unit else number


def _share(quantity: Quantity) -> Number:
    scale = quantity.unit.scale / 100 if quantity.unit else 1
    return Number(quantity.number.value * scale, quantity.number.decimal)


def split_unit(text: str) -> tuple[str, Unit | None]:
    """(formula, unit) of `2\\sqrt{3} cm`, or (`text`, None). A letter is a unit only when it is set apart and the
    formula has no variables."""
    for position in [found.end() for found in _BEFORE_A_UNIT.finditer(text)][-8:]:
        name, core = text[position:], text[:position].rstrip()
        if name[0] in "-(" or not re.search(r"[0-9π]|\\frac|\\sqrt", core):
            continue
        letters = re.sub(r"\\[a-zA-Z]+", "", core)
        if name in LETTERS and (text[position - 1] != " " or re.search("[A-Za-zα-ρσ-ω]", letters)):
            continue
        if re.search(r"(?<![a-z])(?:sin|cos|tan|cot|sec|csc|log|ln|lg)(?![a-z])", core):
            continue
        if unit := read_unit(name):
            return core, unit
    return text, None
