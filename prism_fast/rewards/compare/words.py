"""Answers in words."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[,.!;:\"…]+")
_INITIALS = re.compile(r"(?<=[^\W\d_])\.(?=[^\W\d_]|$)")
_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
_GREEK = re.compile("[α-ωΑ-Ω]")
_OPTIONS = "abcd"
_EMPHASIS = re.compile(r"\*+([^*]+)\*+")
_WORD = re.compile(r"[^\W\d_]+")
_AGREEMENT = re.compile(
    r"(yes|no|true|false|对|错|是|否|不是|正确|错误)(?:的)?\b\s*[,.;:!-]\s*(.+)"
    r"|(yes|no)\s+(?:because|since)\s+(.+)",
    re.IGNORECASE,
)
_OTHER = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_UNSURE = re.compile(
    r"\b(?:or|but|however|maybe|perhaps|unsure|sure|although|wait|actually)\b|或|但|不确定", re.IGNORECASE
)
_SAME = {"对的": "对", "是的": "是", "正确的": "正确", "错误的": "错误", "错的": "错", "不对的": "不对"}
_ELEMENTS = frozenset(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Ag Cd Sn "
    "Sb I Xe Cs Ba Pt Au Hg Pb U".split()
)
_CHEMICAL = re.compile(r"[A-Z(](?:[A-Za-z0-9()]|_\{?[0-9]|[0-9]\}|\^\{?[0-9]?[+-]\}?)*+")
_LABEL = re.compile(r"([A-Za-z]{2,}(?: [A-Za-z]{2,})*) ?([0-9]+(?:\.[0-9]+)*[a-zA-Z]?)|([0-9])[dD]")


def prose(text: str) -> str | None:
    """`text` (normalised) as lower-case words without punctuation, or None when it is not prose.

    Prose is made of letters of any script, spaces, hyphens and punctuation, with at least one word of two letters (one
    ideograph is a word), or is one single letter. Anything with digits, operators, commands or inner brackets is left
    to the structural and mathematical rules, where punctuation carries meaning.
    """
    text = _EMPHASIS.sub(r"\1", text)
    if text.endswith("?"):
        return None  # a question is no answer
    if text.startswith("(") and text.endswith(")") and "," not in text:
        text = text[1:-1]
    words = " ".join(_PUNCTUATION.sub(" ", _INITIALS.sub("", _APOSTROPHE.sub("", text))).split()).lower()
    if not words or not all(character.isalpha() or character in " -" or _is_mark(character) for character in words):
        return None
    if _GREEK.search(words) and len(words) > 1:
        return None
    runs = _WORD.findall(words)
    if not runs or (len(words) > 1 and not any(len(run) > 1 or ord(run) > 0x2E7F for run in runs)):
        return None
    if len(words) == 1 and words not in _OPTIONS:
        return text  # of a single letter, which may be a symbol, the case counts
    return _SAME.get(words, words)


def verdict_word(text: str) -> str | None:
    """The yes, no, true or false that begins an answer and is only explained by the rest ("No, because …"), else
    None."""
    found = _AGREEMENT.fullmatch(text)
    if not found:
        return None
    word, rest = (found[1] or found[3]).lower(), found[2] or found[4]
    other = _OTHER.get(word)
    if not re.search(r"[a-z]+[ '][a-z]+|[\u4e00-\u9fff]{2}", rest, re.IGNORECASE):
        return None  # what follows is no explanation
    if word not in ("no", "false") and re.search(r"\b(?:not|never)\b|n't\b|[不没非]", rest):
        return None
    if _UNSURE.search(rest) or (other and re.search(rf"\b{other}\b", rest, re.IGNORECASE)):
        return None
    return _SAME.get(word, word)


def matter(text: str) -> str | None:
    """A chemical formula in one writing (`H_2O` is `H2O`), or None."""
    if not _CHEMICAL.fullmatch(text) or not re.search("[0-9+-]", text):
        return None
    symbols = re.findall("[A-Z][a-z]?", text)
    if not symbols or not all(symbol in _ELEMENTS for symbol in symbols):
        return None
    if len(symbols) == 1 and len(symbols[0]) == 1 and "^" not in text:
        return None  # a variable with an index
    return re.sub(r"[_{}]", "", text)


def label(text: str) -> str | None:
    """A name with a number ("Section 2.1", "3D"), in which case does not count."""
    found = _LABEL.fullmatch(text)
    return " ".join(part for part in found.groups() if part).lower() if found else None


def _is_mark(character: str) -> bool:
    return "\u0300" <= character <= "\u036f" or "\u0900" <= character <= "\u0dff"


def squeeze(text: str) -> str:
    """`text` without needless spaces: a space stays only between two letters or digits."""
    return re.sub(r"(?<![\w])\s+|\s+(?![\w])", "", text)
