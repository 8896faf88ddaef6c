"""Plain numbers as exact fractions: reading, and equality of two numbers as answers.

Only ASCII digits count, never Python's own float syntax: `1_000`, `nan` and `0x10` are not numbers here. Read are
integers and decimals, thousands groups of exactly three (`1,234`, `1 234`), exponents (`1e3`, `3×10^{2}`), integer
powers (`2^{10}`), fractions (`1/2`, `\\frac{1}{2}`), mixed numbers (`3 1/2`) and repeating decimals
(`0.\\overline{3}`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10**6)
_MAX_EXPONENT = 1000
_MAX_POWER_BITS = 4096

_INT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_RAISED = r"(?:\^|\*\*)\s*(?:\{\s*(?P<p>[+-]?[0-9]{1,4})\s*\}|\(\s*(?P<r>[+-]?[0-9]{1,4})\s*\)|(?P<q>[+-]?[0-9]{1,4}))"
_POWER_OF_TEN = rf"(?:[eE](?P<e>[+-]?[0-9]{{1,4}})|\s*[×·*xX]\s*10\s*{_RAISED})"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<body>{_DECIMAL})(?:{_POWER_OF_TEN})?(?![0-9])")
_INTEGER_POWER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<base>[0-9]{{1,6}})\s*{_RAISED}(?![0-9.,]*[0-9])")
_TOP, _BOTTOM = (rf"\{{\s*(?P<{name}>[+-]?\s*{_DECIMAL})\s*\}}" for name in "ab")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)\s*(?=\\)|(?P<whole2>[0-9]+)\s+(?=[0-9]))?"
    rf"(?:\\frac\s*{_TOP}\s*{_BOTTOM}"
    rf"|(?P<n>{_DECIMAL})\s*/\s*(?P<d>[+-]?{_DECIMAL}))(?![0-9])"
)
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>[0-9]{1,12})\.(?P<fixed>[0-9]{0,12})"
    r"(?:\\(?:overline|bar|dot)\s*\{?(?P<again>[0-9]{1,6})\}?|\((?P<again2>[0-9]{1,6})\))(?!\d|\.)"
)
_SHORT = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Number:
    """`value` exactly as written; `decimal` when it was written with a point or an exponent, so that it may be a
    rounded value."""

    value: Fraction
    decimal: bool


def parse_number(text: str) -> Number | None:
    """The number that `text` (normalised, without a unit) writes, or None when the whole text is not one number."""
    if _SHORT.fullmatch(text):
        return Number(Fraction(int(text)), False)
    found = leading_number(text)
    return found[0] if found is not None and found[1] == len(text) else None


def leading_number(text: str) -> tuple[Number, int] | None:
    """The longest number at the beginning of `text` and where it ends."""
    best: tuple[Number, int] | None = None
    for pattern, read in _READERS:
        match = pattern.match(text)
        if match and (best is None or match.end() > best[1]) and (number := read(match)) is not None:
            best = (number, match.end())
    return best


def _signed(match: re.Match[str], value: Fraction, decimal: bool) -> Number:
    return Number(-value if match["sign"] == "-" else value, decimal)


def _exponent(match: re.Match[str]) -> str:
    return match["p"] or match["r"] or match["q"] or "0"


def _read_number(match: re.Match[str]) -> Number | None:
    exponent = int(match["e"] or _exponent(match))
    if abs(exponent) > _MAX_EXPONENT:
        return None
    value = _fraction(match["body"]) * Fraction(10) ** exponent
    return _signed(match, value, "." in match["body"] or bool(match["e"]))


def _read_power(match: re.Match[str]) -> Number | None:
    base, exponent = int(match["base"]), int(_exponent(match))
    if base == 0 or base.bit_length() * abs(exponent) > _MAX_POWER_BITS:
        return None
    return _signed(match, Fraction(base) ** exponent, False)


def _read_fraction(match: re.Match[str]) -> Number | None:
    top, bottom = match["a"] or match["n"], match["b"] or match["d"]
    if _fraction(bottom) == 0:
        return None
    value = _fraction(top) / _fraction(bottom)
    whole = match["whole"] or match["whole2"]
    if whole is not None:
        if not 0 < value < 1:
            return None  # "3 5/2" is no mixed number; later rules read it as an expression
        value += int(whole)
    return _signed(match, value, "." in top + bottom)


def _read_repeating(match: re.Match[str]) -> Number | None:
    fixed, again = match["fixed"], match["again"] or match["again2"]
    value = Fraction(int(match["whole"] + fixed), 10 ** len(fixed))
    value += Fraction(int(again), 10 ** len(fixed) * (10 ** len(again) - 1))
    return _signed(match, value, False)


_READERS = (
    (_NUMBER, _read_number),
    (_FRACTION, _read_fraction),
    (_INTEGER_POWER, _read_power),
    (_REPEATING, _read_repeating),
)


def _fraction(text: str) -> Fraction:
    digits = re.sub("[, ]", "", text)
    return Fraction(digits.rstrip(".") if digits.endswith(".") else digits)


def same_number(gold: Number, answer: Number) -> bool:
    """Exact equality; where a rounded decimal is involved, a relative error up to 1e-6 (published threshold) as well.

    Two whole numbers are always compared exactly (the published rule calls 10000001 and 10000000 the same), nothing but
    0 equals 0, and a decimal is never further than 0.001 from a ground truth that is written as a whole number.
    """
    if gold.value == answer.value:
        return True
    if not (gold.decimal or answer.decimal) or (gold.value.denominator == 1 and answer.value.denominator == 1):
        return False
    error = abs(gold.value - answer.value)
    if gold.value.denominator == 1 and not gold.decimal and error > Fraction(1, 1000):
        return False
    return error <= RELATIVE_TOLERANCE * abs(gold.value)
