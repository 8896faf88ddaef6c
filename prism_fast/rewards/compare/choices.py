"""Multiple choice: the letters that an answer chooses, and the letters and text that a ground truth names.

Options are A to J. An answer that mentions another option beside its own, or denies or hedges, chooses none; the
published rule takes the first one mentioned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_L = "[A-J]"
_WHOLE = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*[.:)]?")
_LABELLED = re.compile(
    r"(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-J])\s*[.:)、])"
    r"(?:\s+(?=\S)|(?=[\\$¤€£√π\u4e00-\u9fff])|(?<=[.:、])(?=[^\s.):=]))(.+)"
    r"|([A-J])(?:\s*[,;]\s*|\s+)((?:because|since|as|which|因为|理由).+)"
    r"|([A-J])\s+-\s+(\S.*)",
    re.DOTALL,
)
_CHOSEN = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:i (?:choose|pick|select|think(?: it is)?)\s+)?"
    r"(?:the\s+)?(?:correct\s+|right\s+|best\s+)*"
    r"(?:option|choice|answer)\s*(?:is|:|=)?\s*(?:option\s*)?[(\[]?\s*([A-Ja-j])\s*[)\]]?(?![\w'])"
    r"\s*(?:is (?:correct|right)|[.:])?"
    r"|(?:所以|因此|综上|本题|故|应|,)*选(?:择|项)?\s*:?\s*[(\[]?\s*([A-Ja-j])\s*[)\]]?(?:选?项)?(?:正确)?"
    r"|[(\[]?([A-J])[)\]]?\s*(?:选?项)(?:是)?(?:正确(?:的)?)?|(?:选项)\s*[(\[]?([A-J])[)\]]?(?:正确)?"
    r"|i (?:choose|pick|select|would choose|go with)\s+[(\[]?\s*([A-Ja-j])\s*[)\]]?[.]?"
    r"|[(\[]?([A-J])[)\]]?\s+is\s+(?:the\s+)?(?:correct|right)(?:\s+(?:answer|option|choice))?",
    re.IGNORECASE,
)
_MENTION = re.compile(
    r"(?<![\w\\)\]*/^-])[(\[]\s*([A-Ja-j])\s*[)\]](?![\w(\[])|(?<![\w.(\[])([A-J])[.)](?=\s|$)|\b(?:option|choice|answer)\s*(?:is|:|=)?\s*[(\[]?([A-Ja-j])\b(?!['\w])",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:[^\W\d_]|[\s.,:;!'\"()\[\]-])*")
_NAMED = re.compile(r"\b(?:answer|option|choice|choose|pick)\b", re.IGNORECASE)
_BARE = re.compile(r"(?<![\w\\])([A-J])(?![\w'])")
_NEGATION = re.compile(
    r"\b(?:not|isn't|n't|neither|nor|except|wrong|incorrect|either|or|maybe)\b|[不非或]|错", re.IGNORECASE
)
_RUN = re.compile(rf"{_L}{{2,6}}")
_SEPARATED = re.compile(
    rf"[(\[]?{_L}[)\]]?(?:\s*(?:,|、|;|&|\band\b|和|,\s*and\b|\)\s*\(|\+)\s*[(\[]?{_L}[)\]]?)+|(?:[(\[]{_L}[)\]]\s*){{2,6}}"
)
_SPACED = re.compile(rf"{_L}(?: {_L}){{2,5}}")


@dataclass(frozen=True)
class Choice:
    """An option: its letter in upper case and the option's text, empty when only the letter was given."""

    letter: str
    text: str


def gold_choice(text: str) -> Choice | None:
    """The option a ground truth names: a bare `A`…`J` (upper case, brackets or a final mark allowed), `(x) text` or `X.
    text`; None when it is no option."""
    found = _WHOLE.fullmatch(text)
    if found and (found[1].isupper() or text[0] in "(["):
        return Choice(found[1].upper(), "")
    found = _CHOSEN.fullmatch(text) if len(text) > 2 else None
    if found:
        return Choice(next(letter for letter in found.groups() if letter).upper(), "")
    return _labelled(text) if len(text) > 2 else None


def answer_choice(text: str) -> Choice | None:
    """The one option that an answer chooses, or None when it chooses none or more than one."""
    found = _WHOLE.fullmatch(text)
    if found:
        return Choice(found[1].upper(), "")
    found = _CHOSEN.fullmatch(text)
    if found:
        return Choice(next(letter for letter in found.groups() if letter).upper(), "")
    labelled = _labelled(text)
    because = labelled is not None and re.match("because|since|as|which|因为|理由", labelled.text)
    if _NEGATION.search(text) and not because:
        return None
    mentioned = {next(letter for letter in groups if letter).upper() for groups in _MENTION.findall(text)}
    if labelled is None and not _SENTENCE.fullmatch(text) and not _NAMED.search(text):
        return None
    if labelled:
        bare = set(_BARE.findall(labelled.text))
        others = (bare if because or not mentioned - {labelled.letter} else bare & mentioned) - {labelled.letter}
        if because:
            return None if others else Choice(labelled.letter, "")
        only = labelled.text.strip("()[]. ")
        return None if others & mentioned or only in set("ABCDEFGHIJ") else labelled
    return Choice(mentioned.pop(), "") if len(mentioned) == 1 else None


def _labelled(text: str) -> Choice | None:
    found = _LABELLED.fullmatch(text)
    if not found:
        return None
    letter = found[1] or found[2] or found[4] or found[6]
    return Choice(letter.upper(), (found[3] or found[5] or found[7]).strip())


def several(text: str) -> tuple[str, bool] | None:
    """(letters, written apart) of several chosen options, or None. Letters written together (`ACD`) may also be a name
    (a segment, a triangle); only with separators is their order free."""
    if _RUN.fullmatch(text):
        return (text, False) if len(set(text)) == len(text) else None
    if _SEPARATED.fullmatch(text) or _SPACED.fullmatch(text):
        letters = re.sub("(?<![A-Z])and(?![A-Z])|[^A-J]", "", text)
        return (letters, True) if len(set(letters)) == len(letters) > 1 else None
    return None
