"""The published mm_gad answer rules, quirks included (`semantics="released"`), to reproduce published results; train
with `rewards/compare/`.

Order: split both sides into values, simplify each, compare the pairs by coordinates, then by the relaxed rules, then by
math-verify. Quirks kept on purpose: commas between digits are dropped before coordinates are parsed, units are stripped
before numbers are compared, Python's own float syntax counts as a number, and punctuation is deleted from words (so
`1:2` equals `12`).
"""

from __future__ import annotations

import re
from itertools import product

from prism_fast.rewards.verdict import Probe, Verdict, all_of, ask

_MARKER = re.compile(r"\(\d+\)\s*")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_PAIR = re.compile(rf"\(?\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)?")
_UNIT = re.compile(
    r"(?<=\d)\s*(°[CF]?|%|cm[²³]?|dm|km|kg|mg|mm|m[²³]|ml|ft|feet|hr|lbs?|min|sec|people|persons?|inches?|lit(?:er|re)s?|"
    r"(?:meter|pound|second|minute|hour|day|year|plate|piece|item|student|time)s?|厘米|千克|[元米克度个条张块人次])\s*$",
    re.IGNORECASE,
)
_PUNCTUATION = str.maketrans("", "", "，。！？、；：“”‘’（）[]【】{}\",;:!?'().")
_END = r"(?=$|[\s,;:.!?])"
_START = r"(?:^|[\s,;:])"
_WHOLE_LETTER = re.compile(r"[(\[{]?\s*([A-H])\s*[)\]}]?\s*[.:]?", re.IGNORECASE)
_LETTER_TOKENS = (
    re.compile(
        r"\b(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\s*(?:is|:)\s*[(\[{]?\s*([A-H])\s*[)\]}]?"
        + _END,
        re.IGNORECASE,
    ),
    re.compile(_START + r"\(([A-Ha-h])\)" + _END),
    re.compile(_START + r"([A-Ha-h])[.)]" + _END),
)
_GOLD_OPTION = re.compile(r"\(([A-Ha-h])\)\s+.|([A-Ha-h])\.\s+(?=[(\[{0-9+-]).", re.DOTALL)


def compare_mm_gad(gold: str, answer: str) -> Verdict:
    """The verdict of the published rules on one answer; branches are named as in the reference vectors."""
    gold_parts, answer_parts = split_values(gold), split_values(answer)
    if len(gold_parts) == 1 and len(answer_parts) == 1:
        return _single(gold_parts[0], answer_parts[0])
    if len(gold_parts) != len(answer_parts):
        return Verdict(False, "multi_value")
    return all_of((_single(*pair) for pair in zip(gold_parts, answer_parts, strict=True)), "multi_value")


def split_values(text: str) -> list[str]:
    """The values of an answer: between `(1) … (2) …` markers, else between semicolons, else between commas outside
    brackets."""
    text = text.strip()
    markers = list(_MARKER.finditer(text))
    readings = [re.split("[;；]", text), _split_commas(text)]
    if len(markers) >= 2 and markers[0].start() <= 2:
        ends = [marker.start() for marker in markers[1:]] + [len(text)]
        pieces = (text[marker.end() : end].strip() for marker, end in zip(markers, ends, strict=True))
        readings.insert(0, [piece.rstrip(",;，；") for piece in pieces])
    for reading in readings:
        parts = [part.strip() for part in reading if part.strip()]
        if len(parts) > 1:
            return parts
    return [text]


def _split_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def peel(text: str) -> str:
    """`text` without one layer each of `$$`, `$`, `\\(…\\)` and `\\[…\\]`, in this order, unless one is empty."""
    text = text.strip()
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)].strip()
    return text


def plain_latex(text: str) -> str:
    """`\\dfrac` and `\\tfrac` as `\\frac`, text wrappers and `\\left` / `\\right` dropped, blanks inside braces
    trimmed, single spaces."""
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    for wrapper in ("text", "mathrm"):
        text = re.sub(rf"\\{wrapper}\s*\{{([^}}]*)\}}", r"\1", text)
    text = re.sub(r"\\(?:left|right)\s*", "", text)
    text = re.sub(r"(?<=\{)\s+|\s+(?=\})", "", text)
    return re.sub(r"\s+", " ", text).strip()


def simplify(text: str) -> str:
    """The published normalisation of one value."""
    text = _join_digits(plain_latex(peel(text)))
    return text.removesuffix(".").strip()


def _join_digits(text: str) -> str:
    return re.sub(r"(\d),(\d)", r"\1\2", text).replace("，", "")


def _single(gold: str, answer: str) -> Verdict:
    gold, answer = simplify(gold), simplify(answer)
    gold_pairs, answer_pairs = _PAIR.findall(gold), _PAIR.findall(answer)
    if gold_pairs and answer_pairs:
        same = len(gold_pairs) == len(answer_pairs) and all(
            not abs(float(left) - float(right)) > 1e-6
            for one, other in zip(gold_pairs, answer_pairs, strict=True)
            for left, right in zip(one, other, strict=True)
        )
        return Verdict(same, "coordinate")
    if _relaxed(gold, answer):
        return Verdict(True, "relaxed_match")
    if len(split_values(gold)) > 1 or len(split_values(answer)) > 1:
        return Verdict(False, "no_match")
    forms = [dict.fromkeys((text, peel(text), plain_latex(peel(text)))) for text in (gold, answer)]
    return ask(Probe(left, right, "published") for left, right in product(*forms))


def _relaxed(gold: str, answer: str) -> bool:
    gold_letter = _gold_letter(gold)
    if gold_letter is not None:
        return _letter(answer) == gold_letter
    if gold == answer:
        return True
    expected, given = _float(gold), _float(answer)
    if expected is not None and given is not None:
        return given == 0 if expected == 0 else abs(given - expected) / abs(expected) < 1e-6
    if _words(gold) == _words(answer):
        return True
    units = [found[1].lower() if (found := _UNIT.search(text)) else "" for text in (gold, answer)]
    values = [_UNIT.sub("", text).strip() for text in (gold, answer)]
    return units[0] == units[1] and all(values) and _words(values[0]) == _words(values[1])


def _gold_letter(gold: str) -> str | None:
    if re.fullmatch("[A-H]", gold):
        return gold
    found = _GOLD_OPTION.match(gold)
    return (found[1] or found[2]).upper() if found else None


def _letter(answer: str) -> str | None:
    """The first letter of the first form that occurs: alone, after "answer is", in brackets, before a point."""
    found = _WHOLE_LETTER.fullmatch(answer)
    if found is None:
        found = next((match for pattern in _LETTER_TOKENS if (match := pattern.search(answer))), None)
    return found[1].upper() if found else None


def _float(text: str) -> float | None:
    try:
        return float(_UNIT.sub("", _join_digits(text)))
    except ValueError:
        return None


def _words(text: str) -> str:
    text = re.sub(r"\*{1,2}(.+?)\*{1,2}", r"\1", text.lower().strip())
    return " ".join(text.translate(_PUNCTUATION).split())
