"""Multiple choice: the letter that an answer chooses, and the letter and text that a ground truth names.

Options are A to H. An answer that mentions two different options, or a negation, chooses none; the published rule takes
the first one mentioned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABELLED = re.compile(r"(?:[(\[]\s*([A-Ha-h])\s*[)\]]|([A-H])\s*[.):])(?:\s+(?=\S)|(?=[^\s\w.):=]))(.+)", re.DOTALL)
_WHOLE = re.compile(r"[(\[{]?\s*([A-Ha-h])\s*[)\]}]?\s*[.:)]?")
_MENTION = re.compile(
    r"[(\[]\s*([A-Ha-h])\s*[)\]]|(?<![\w.])([A-H])[.)](?=\s|$)|\b(?:option|choice|answer)\s*(?:is|:|=)?\s*[(\[]?([A-Ha-h])\b(?!['\w])",
    re.IGNORECASE,
)
_BARE = re.compile(r"(?<![\w\\])([A-H])(?![\w'])")
_NEGATION = re.compile(r"\b(?:not|isn't|n't|neither|nor|except|wrong|incorrect|either|or)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """An option: its letter in upper case and the option's text, empty when only the letter was given."""

    letter: str
    text: str


def gold_choice(text: str) -> Choice | None:
    """The option a ground truth names: a bare `A`…`H` (upper case, brackets or a final mark allowed), `(x) text` or `X.
    text`; None when it is no option."""
    found = _WHOLE.fullmatch(text)
    if found and (found[1].isupper() or text[0] in "(["):
        return Choice(found[1].upper(), "")
    return _labelled(text)


def answer_choice(text: str) -> Choice | None:
    """The one option that an answer chooses, or None when it chooses none or more than one."""
    found = _WHOLE.fullmatch(text)
    if found:
        return Choice(found[1].upper(), "")
    if _NEGATION.search(text):
        return None
    labelled = _labelled(text)
    mentioned = {next(letter for letter in groups if letter).upper() for groups in _MENTION.findall(text)}
    if labelled:
        others = {letter for letter in _BARE.findall(labelled.text)} & mentioned - {labelled.letter}
        return None if others else labelled
    return Choice(mentioned.pop(), "") if len(mentioned) == 1 else None


def _labelled(text: str) -> Choice | None:
    found = _LABELLED.fullmatch(text)
    return Choice((found[1] or found[2]).upper(), found[3].strip()) if found else None
