"""Numbers in words: English through text2num, Chinese numerals and magnitudes (`三分之一`, `5万`) here."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
_ENGLISH = frozenset(f"{_UNITS} hundred thousand million billion trillion and".split())
_FIRST = frozenset(_UNITS.split())
_PARTS = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("quarter", "quarters"), 4),
    **{
        name + ending: value
        for value, name in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3)
        for ending in ("", "s")
    },
}
_DIGITS = {**dict(zip("零一二三四五六七八九", range(10), strict=True)), "〇": 0, "两": 2}
_SMALL = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"万": 10**4, "亿": 10**8}
_DECIMALS = re.compile("[零一二三四五六七八九]+")
_NUMERAL = re.compile("[零〇一二两三四五六七八九十百千万亿]+")


def leading_words(text: str) -> tuple[Fraction, int] | None:
    """The number that words at the beginning of `text` say, and where they end."""
    if not text or not (text[0].isalpha()):
        return None
    return _english(text) if text[0].isascii() else _chinese(text)


def _english(text: str) -> tuple[Fraction, int] | None:
    words = list(re.finditer(r"[A-Za-z]+", text))
    first = words[0][0].lower()
    if first in ("half", "a", "an") or first in _FIRST:
        if (part := _part(text, words)) is not None:
            return part
    if first not in _FIRST:
        return None
    count = 0
    while count < len(words) and words[count][0].lower() in _ENGLISH:
        if count and text[words[count - 1].end() : words[count].start()] not in (" ", "-"):
            break
        count += 1
    if words[count - 1][0].lower() == "and":
        count -= 1
    from text_to_num import text2num

    end = words[count - 1].end()
    try:
        return Fraction(text2num(text[:end].lower(), "en")), end
    except ValueError:  # number words in no order that makes a number: "one two"
        return None


def _part(text: str, words: list[re.Match[str]]) -> tuple[Fraction, int] | None:
    """`two thirds`, `a half`, `half`."""
    named = [word[0].lower() for word in words[:2]]
    if named[0] == "half":
        return Fraction(1, 2), words[0].end()
    if len(named) < 2 or named[1] not in _PARTS:
        return None
    top = 1 if named[0] in ("a", "an") else _UNITS.split().index(named[0])
    return (Fraction(top, _PARTS[named[1]]), words[1].end()) if 0 < top < 20 else None


def _chinese(text: str) -> tuple[Fraction, int] | None:
    if text.startswith("负") and (found := _chinese(text[1:])) is not None:
        return -found[0], found[1] + 1
    if text.startswith("一半"):
        return Fraction(1, 2), 2
    found = _NUMERAL.match(text)
    if not found:
        return None
    value, end = _numeral(found[0]), found.end()
    if value is not None and text.startswith("分之", end) and (top := _NUMERAL.match(text, end + 2)) and value:
        upper = _numeral(top[0])
        return None if upper is None else (Fraction(upper, value), top.end())
    if value is not None and text.startswith("点", end) and (tail := _DECIMALS.match(text, end + 1)):
        digits = "".join(str(_DIGITS[digit]) for digit in tail[0])
        return value + Fraction(int(digits), 10 ** len(digits)), tail.end()
    return None if value is None else (Fraction(value), end)


def _numeral(text: str) -> int | None:
    """The value of a Chinese numeral such as `二十五` or `三千二百`, None when its order makes no number."""
    if len(text) > 1 and all(character in _DIGITS for character in text):
        return int("".join(str(_DIGITS[character]) for character in text))
    total, section, digit = 0, 0, -1
    for character in text:
        if character in _DIGITS:
            if digit > 0:
                return None
            digit = _DIGITS[character]
        elif character in _SMALL:
            section += (1 if digit < 0 else digit) * _SMALL[character]
            digit = -1
        else:
            section += max(digit, 0)
            total = (total + section) * _LARGE[character] if character == "亿" else total + section * _LARGE[character]
            section, digit = 0, -1
    return total + section + max(digit, 0)
