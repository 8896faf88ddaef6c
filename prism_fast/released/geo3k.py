"""The published grading of geometry3k (`semantics="released"`): MATH-style normal forms, then a symbolic difference of
zero.

The published grader gives normalised text to a Python evaluator. Here a worker forms the difference from parsed LaTeX,
so text that only a Python evaluator accepts (or that evaluates to something else than it says) gets no symbolic
comparison; both normal forms are reproduced.
"""

from __future__ import annotations

import logging
import re

from pylatexenc.latex2text import LatexNodes2Text

from prism_fast.released.calculator import to_latex
from prism_fast.rewards.verdict import Probe, Verdict, all_of, ask

_ENCLOSING_TEXT = re.compile(r"^\\text\{(.+?)\}$")
_DROPPED = ("\n", r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", r"\%", "%")
_UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard".split()
_MAGNITUDES = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
_BRACKETS = "()[]"
_CALCULATOR = re.compile(r"[0-9a-zα-ω.+\-*/^()!\s]+")
_SIGNS = {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}

logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)  # it warns of every malformed answer


def compare_geo3k(gold: str, answer: str) -> Verdict:
    """The verdict of the published geometry3k grading on one answer (which may be empty)."""
    if compact_form(gold) == compact_form(answer):
        return Verdict(True, "normal_form")
    gold, answer = spoken_form(gold), spoken_form(answer)
    if gold == answer:
        return Verdict(True, "normal_form")
    if not answer:
        return Verdict(False, "no_match")
    gold_parts, answer_parts = _elements(gold), _elements(answer)
    if len(gold_parts) != len(answer_parts) or (len(gold_parts) > 1 and (gold[0], gold[-1]) != (answer[0], answer[-1])):
        return Verdict(False, "no_match")
    return all_of((_element(*pair) for pair in zip(gold_parts, answer_parts, strict=True)), "math_verify")


def compact_form(text: str) -> str:
    """The MATH data set's normal form: LaTeX without blanks, units, degree and percent signs, short fractions and roots
    spelled out."""
    text = text.strip()
    if found := _ENCLOSING_TEXT.search(text):
        text = found[1].strip()
    compact = _compact(text)
    return text if compact is None else compact


def _compact(text: str) -> str | None:
    """The normal form, or None for malformed LaTeX (which is then compared unchanged)."""
    for dropped in _DROPPED[:2]:
        text = text.replace(dropped, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dropped in _DROPPED[2:7]:
        text = text.replace(dropped, "")
    pieces = text.split(r"\text{ ")
    if len(pieces) > 2:
        return None
    text = pieces[0]
    for dropped in _DROPPED[7:]:
        text = text.replace(dropped, "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    if re.search(r"\\sqrt$|\\sqrt(?=\\sqrt)", text):
        return None
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text, flags=re.DOTALL).replace(" ", "")
    # From left to right: a fraction without numerator is malformed, one without denominator leaves all as they are.
    broken = re.search(r"\\frac(?:(?P<empty>$|(?=\\frac))|[^{](?:$|(?=\\frac)))", text, re.DOTALL)
    if broken is not None and broken["empty"] is not None:
        return None
    if broken is None:
        text = re.sub(
            r"\\frac([^{])(?:([^{])|(?=\{))",
            lambda found: rf"\frac{{{found[1]}}}" + (f"{{{found[2]}}}" if found[2] else ""),
            text,
        )
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"^(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))$", r"\\frac{\1}{\2}", text)


def spoken_form(text: str) -> str:
    """The second normal form: lower-case calculator text without blanks, units, dollar and percent signs."""
    if found := _ENCLOSING_TEXT.search(text):
        text = found[1]
    for sign in (r"\%", r"\$", "$", "%"):
        text = text.replace(sign, "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, factor in _MAGNITUDES.items():
        text = text.replace(word, factor)
    for unit in _UNITS:
        text = re.sub(rf"{unit}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    text = _whole(text)
    if "\\" in text:
        text = _without_latex(text)
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    number = _float(_join_thousands(text))
    if number is not None and abs(number - round(number)) <= 1e-7:
        return str(int(float(text.replace(",", ""))))
    return text


def _without_latex(text: str) -> str:
    """LaTeX as plain text, read by pylatexenc as published: `\\frac{a}{b}` becomes `a/b` (no brackets), `\\sqrt{a}`
    becomes `sqrt(a)`, symbols their characters, and commands that pylatexenc does not know vanish (`\\triangle` is
    one)."""
    spaced = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    try:
        plain = LatexNodes2Text().latex_to_text(spaced)  # a new one: it would remember a \\title
    except Exception:  # whatever it is: the published grader goes on with the text as it was
        return text
    for sign, word in _SIGNS.items():
        plain = plain.replace(sign, word)
    return plain.strip()


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) != float("inf") and value == value else None


def _whole(text: str) -> str:
    number = _float(text)
    return str(round(number)) if number is not None and abs(number - round(number)) <= 1e-7 else text


def _join_thousands(text: str) -> str:
    while (joined := re.sub(r"(\d),(\d\d\d)($|\D)", r"\1\2\3", text)) != text:
        text = joined
    return text


def _elements(text: str) -> list[str]:
    text = _join_thousands(text)
    if (
        len(text) > 2
        and text[0] in _BRACKETS
        and text[-1] in _BRACKETS
        and not any(sign in text[1:-1] for sign in _BRACKETS)
    ):
        return [part.strip() for part in text[1:-1].split(",")]
    return [text] if text else []


def _element(gold: str, answer: str) -> Verdict:
    fraction = r"^-?[0-9]+.?/0*[1-9][0-9]*.?$"
    if re.search(fraction, gold) and re.search(fraction, answer):
        return Verdict(gold == answer, "normal_form")  # an unreduced fraction is another answer here
    whole = [
        (number := _float(_join_thousands(text))) is not None and abs(number - round(number)) <= 1e-7
        for text in (gold, answer)
    ]
    if whole[0] != whole[1] or not all(_CALCULATOR.fullmatch(text) for text in (gold, answer)):
        return Verdict(False, "no_match")
    if not _may_subtract(f"({gold})-({answer})"):
        return Verdict(False, "no_match")
    return ask([Probe(to_latex(gold), to_latex(answer), "difference")])


def _may_subtract(text: str) -> bool:
    letters = {character for character in text.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    return (
        len(letters) <= 2 and "^{" not in text and "^(" not in text and not re.search(r"\^[0-9]+\^|\^[0-9][0-9]+", text)
    )
