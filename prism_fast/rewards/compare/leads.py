"""What people write around an answer: "The answer is", "答案是", "There are 3", emphasis, a final full stop.

A sentence is opened only where a value follows ("the total number of red cars is 4") and never where it denies, hedges
between two or sets a condition.
"""

from __future__ import annotations

import re

_QUOTES = ("'", '"', "*", "`", "__", "_")
_ANSWER = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?(?:the\s+|my\s+)?(?:correct\s+|final\s+|right\s+)*(?:answer|result|solution)"
    r"\s*(?:is\s*:?|:|=)\s*(?:that\s+)?(?=\S)"
    r"|(?:(?:so|thus|therefore|hence)(?:,\s*|\s+)|∴\s*)(?=\S)"
    r"|(?:所以|因此|综上|综上所述|则|即|故)?\s*[,:]?\s*(?:本题|该题|此题)?的?(?:正确|最终|最后)?的?(?:答案|结果|结论|选项)"
    r"(?:应该?|就)?\s*(?:是|为|选|[:=])\s*[:]?\s*(?=\S)"
    r"|(?:所以|因此|综上|综上所述)[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not|no|never|n't|wrong|incorrect|except|without|or|if|unless|than|neither|nor|isn't|aren't|false|either|"
    r"between|maybe|perhaps|because|since|when|where|which|that|so)\b",
    re.IGNORECASE,
)
_NUMBER_WORD = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b"
)
_STATEMENT = re.compile(
    r"([A-Za-z][A-Za-z' -]{0,80}?)\s+"
    r"(?:is|are|was|were|equals|has|have|contains?|shows?|measures|be|see|count|counted|found)\s*:?\s+"
    r"(?:exactly |a total of |equal to |about |approximately )?"
    rf"(?=[-+]?\s*(?:[0-9.¤€£¥₹]|\\frac|\\sqrt|π)|{_NUMBER_WORD})"
)
_LABEL = re.compile(
    r"([A-Z][A-Za-z]{2,}(?: [A-Za-z]+){0,5}|(?:total|sum|count|number|area|value|length|result)[a-z ]{0,30})"
    r"\s*:\s*(?=[-+]?\s*(?:[0-9.¤€£¥₹]|\\frac|\\sqrt))"
)
_CHINESE = re.compile(
    r"([\u4e00-\u9fff]{1,12}?)(?:是|为|等于|约为|约|共有|有|[:=])\s*:?\s*(?=[-+]?\s*(?:[0-9.¥€£¤]|\\frac|\\sqrt|π))"
)
_CHINESE_DENIES = re.compile("[不非没无否未或如若除每第]")
_HEDGE = re.compile(
    r"(?:approximately|approx\.?|about|around|roughly|circa|≈|=|约为?|大约|[一总]?共有?|等于)\s*(?=[-+¤€£¥₹.0-9\\√π(])",
    re.IGNORECASE,
)
_LOCATION = re.compile(
    r"\s+(?:in|on|at|inside|within|from|shown in|visible in|present in)\s+(?:the|this|that)\s+(?:\w+\s+)?"
    r"(?:image|picture|photo|figure|scene|diagram|chart|graph|table|total)\s*$"
    r"|\s+(?:in total|in all|altogether|overall|total)\s*$"
    r"|\s+(?:is|are|can be) (?:visible|shown|present|seen|pictured|depicted)\s*$",
    re.IGNORECASE,
)


def bare(text: str) -> str:
    """`text` (typeset) without lead-ins, whole-text brackets of emphasis and final punctuation."""
    while True:
        peeled = _peel(text)
        if peeled == text:
            return text
        text = peeled


def _peel(text: str) -> str:
    for mark in _QUOTES:
        inner = text[len(mark) : -len(mark)].strip()
        if inner and text.startswith(mark) and text.endswith(mark) and mark not in inner:
            return inner
    if text.isascii() and not (" " in text or "=" in text or ":" in text or text[-1:] in ".;,"):
        return text
    if found := _ANSWER.match(text):
        return text[found.end() :]
    if found := _HEDGE.match(text):
        return text[found.end() :]
    if (found := _STATEMENT.match(text)) and not _DENIES.search(found[1]):
        return text[found.end() :]
    if (found := _LABEL.match(text)) and not _DENIES.search(found[1]):
        return text[found.end() :]
    if (found := _CHINESE.match(text)) and not _CHINESE_DENIES.search(found[1]):
        return text[found.end() :]
    if (found := _LOCATION.search(text)) and found.start() > 0:
        return text[: found.start()]
    stripped = text.rstrip(" .;,").lstrip(" ,;")
    return stripped if stripped and not stripped.endswith("\\") else text
