"""Normalises typography before comparison: one spelling for equal meaning; differences of meaning stay."""

from __future__ import annotations

import re
import unicodedata

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = {
    "\u2212": "-",
    "\u3000": " ",
    "、": ",",
    "。": ".",
    "⁄": "/",
    "∕": "/",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "【": "[",
    "】": "]",
}
_TABLE = {**_FULL_WIDTH, **{ord(key): value for key, value in _CHARACTERS.items()}}
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_LATEX_SPACE = re.compile(r"\\(?:[,;:!> ]|quad\b|qquad\b)|~")
_SIZE = re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle)(?![a-zA-Z])\s*")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'))
_BRACED_WRAPPER = re.compile(r"\\(?:boxed|fbox|text|mathrm|textbf|mathbf)\s*\{")
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?(?:the\s+)?(?:correct\s+|final\s+)*(?:answer|result)\s*(?:is\s*:?|:|=)\s*(?=\S)",
    re.IGNORECASE,
)
_STATEMENT = re.compile(r"the\s+[a-z]+(?: [a-z]+){0,3} (?:is|are|equals)\s*:?\s*(?=[-+$.0-9\\(\[{])", re.IGNORECASE)
_HEDGE = re.compile(r"(?:approximately|approx\.?|about|around|roughly|≈|\\approx)\s*(?=[-+$.0-9\\])", re.IGNORECASE)


def clean(text: str) -> str:
    """`text` with one typography: NFC, ASCII punctuation and digits for full-width ones, a hyphen for the minus sign,
    single spaces; math and emphasis wrappers around the whole text peeled; `\\dfrac` = `\\tfrac` = `\\frac`; sizing
    commands, lead-ins ("The answer is") and final punctuation dropped."""
    text = unicodedata.normalize("NFC", text).translate(_TABLE)
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/"), text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = _SIZE.sub("", _LATEX_SPACE.sub(" ", text))
    text = " ".join(text.split())
    while True:
        peeled = _peel(text)
        if peeled == text:
            return text
        text = peeled


def _peel(text: str) -> str:
    for left, right in _WRAPPERS:
        inner = text[len(left) : len(text) - len(right)]
        if (
            text.startswith(left)
            and text.endswith(right)
            and inner.strip()
            and left not in inner
            and right not in inner
        ):
            return inner.strip()
    found = _BRACED_WRAPPER.match(text)
    if found and _closing_brace(text, found.end() - 1) == len(text) - 1 and text[found.end() : -1].strip():
        return text[found.end() : -1].strip()
    for pattern in (_LEAD, _STATEMENT, _HEDGE):
        match = pattern.match(text)
        if match:
            return text[match.end() :]
    stripped = text.rstrip(" .;,").lstrip(" ,;")
    return stripped if stripped and not stripped.endswith("\\") else text


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        if text[index] == "\\":
            continue
        escaped = index > 0 and text[index - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(text[index], 0) if not escaped else 0
        if depth == 0:
            return index
    return -1
