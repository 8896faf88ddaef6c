"""Comparison of answers in words."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[,.!?;:\"…]+")
_INITIALS = re.compile(r"(?<=[^\W\d_])\.(?=[^\W\d_]|$)")
_EMPHASIS = re.compile(r"\*+([^*]+)\*+")
_WORD = re.compile(r"[^\W\d_]+")


def prose(text: str) -> str | None:
    """`text` (cleaned) as lower-case words without punctuation, or None when it is not prose.

    Prose is made of letters of any script, spaces, hyphens and punctuation, with at least one word of two letters (one
    ideograph is a word), or is one single letter. Anything with digits, operators, commands or inner brackets is left
    to the structural and mathematical rules, where punctuation carries meaning.
    """
    text = _EMPHASIS.sub(r"\1", text)
    if text.startswith("(") and text.endswith(")") and "," not in text:
        text = text[1:-1]
    words = " ".join(_PUNCTUATION.sub(" ", _INITIALS.sub("", text.replace("'", ""))).split()).lower()
    if not words or not all(character.isalpha() or character in " -" or _is_mark(character) for character in words):
        return None
    runs = _WORD.findall(words)
    if not runs or (len(words) > 1 and not any(len(run) > 1 or ord(run) > 0x2E7F for run in runs)):
        return None
    return words


def _is_mark(character: str) -> bool:
    return "\u0300" <= character <= "\u036f" or "\u0900" <= character <= "\u0dff"


def squeeze(text: str) -> str:
    """`text` without needless spaces: a space stays only between two letters or digits."""
    return re.sub(r"(?<![\w])\s+|\s+(?![\w])", "", text)
