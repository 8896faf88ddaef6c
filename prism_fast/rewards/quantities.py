"""Plain numbers as exact fractions: parsing, and equality of two numbers as answers.

Only ASCII digits count (full-width ones are mapped to ASCII by `clean.py`), never Python's own float syntax: `1_000`,
`nan` and `0x10` are not numbers here. Accepted: integers and decimals, thousands groups of exactly three (`1,234`,
`1{,}234`, `1 234`), exponents (`1e3`, `3\\times 10^{2}`), fractions (`1/2`, `\\frac{1}{2}`, `\\frac12`) and mixed
numbers (`3 1/2`, `3\\frac{1}{2}`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10**6)
_MAX_EXPONENT = 1000

_INT = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[+-]?[0-9]{1,4})"
    r"|\s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p>[+-]?[0-9]{1,4})\s*\}|(?P<q>[+-]?[0-9]{1,4})))"
)
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<body>{_DECIMAL}){_POWER_OF_TEN}?")
_TOP, _BOTTOM = (rf"\{{\s*(?P<{name}>[+-]?{_DECIMAL})\s*\}}" for name in "ab")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)\s*(?=\\)|(?P<whole2>[0-9]+)\s+(?=[0-9]))?"
    rf"(?:\\frac\s*(?:{_TOP}|(?P<a1>[0-9]))\s*(?:{_BOTTOM}|(?P<b1>[0-9]))"
    rf"|(?P<n>{_DECIMAL})\s*/\s*(?P<d>[+-]?{_DECIMAL}))"
)


@dataclass(frozen=True)
class Number:
    """`value` exactly as written; `decimal` when it was written with a point or an exponent, so that it may be a
    rounded value."""

    value: Fraction
    decimal: bool


def parse_number(text: str) -> Number | None:
    """The number that `text` (cleaned, without a unit) writes, or None when the whole text is not one plain number."""
    match = _NUMBER.fullmatch(text)
    if match:
        exponent = int(match["e"] or match["p"] or match["q"] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        value = _fraction(match["body"]) * Fraction(10) ** exponent
        return Number(-value if match["sign"] == "-" else value, "." in match["body"] or bool(match["e"]))
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    top, bottom = (match["a"] or match["a1"] or match["n"]), (match["b"] or match["b1"] or match["d"])
    if _fraction(bottom) == 0:
        return None
    value = _fraction(top) / _fraction(bottom)
    whole = match["whole"] or match["whole2"]
    if whole is not None:
        if not 0 < value < 1:
            return None  # "3 5/2" is no mixed number; later rules read it as an expression
        value += int(whole)
    return Number(-value if match["sign"] == "-" else value, "." in top + bottom)


def _fraction(text: str) -> Fraction:
    digits = re.sub(r"\{,\}|[, ]", "", text)
    return Fraction(digits.rstrip(".") if digits.endswith(".") else digits)


def same_number(gold: Number, answer: Number) -> bool:
    """Exact equality; where a rounded decimal is involved, a relative error up to 1e-6 (published threshold) as well.

    Two whole numbers are always compared exactly (the published rule calls 10000001 and 10000000 the same), and nothing
    but 0 equals 0.
    """
    if gold.value == answer.value:
        return True
    if not (gold.decimal or answer.decimal) or (gold.value.denominator == 1 and answer.value.denominator == 1):
        return False
    return abs(gold.value - answer.value) <= RELATIVE_TOLERANCE * abs(gold.value)
