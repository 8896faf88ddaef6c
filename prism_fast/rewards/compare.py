"""The default comparison of an answer with a ground truth (`semantics="prism_fast"`): rules first, math-verify only for
real formulas.

The order is fixed and every branch has a name (`Verdict.by`): `not_a_number`, `exact`, `choice`, `text`, `equation`,
`number`, `unit`, `union`, `bracket`, `list`, `ratio`, `infinity`, `too_complex`, `math_verify`, `no_match`. The
comparison of two plain numbers is final; so are brackets of different kinds, units of different dimensions and lists of
different lengths. README.md in this folder lists every difference from the published rules.
"""

from __future__ import annotations

import re
from fractions import Fraction

from prism_fast.rewards.choices import answer_choice, gold_choice
from prism_fast.rewards.clean import clean
from prism_fast.rewards.expressions import is_mathematical, letter_runs, refusal, to_latex
from prism_fast.rewards.quantities import Number, parse_number, same_number
from prism_fast.rewards.structure import bracketed, equality_chain, is_name, list_readings, union_parts
from prism_fast.rewards.text_rules import prose, squeeze
from prism_fast.rewards.units import Unit, split_unit
from prism_fast.rewards.verdict import Probe, Verdict, all_of, ask

_NAN = re.compile(r"(?:^|[\s,;=(\[{])[-+]?nan(?:$|[\s,;)\]}])", re.IGNORECASE)
_INFINITY = re.compile(r"([-+]?)\s*(?:∞|\\infty|inf|infinity|oo)", re.IGNORECASE)
_RELATION = re.compile(r"[<>≤≥≠]|\\(?:leq?|geq?|neq?|lt|gt)(?![a-zA-Z])")
_MAX_NESTING = 12
_MAX_SIDES = 16


def compare(gold: str, answer: str) -> Verdict:
    """Whether `answer` is the same answer as `gold` (both raw text). Never evaluates either; undecided formulas come
    back as a question."""
    gold, answer = clean(gold), clean(answer)
    if _NAN.search(gold) or _NAN.search(answer):
        return Verdict(False, "not_a_number")
    if gold == answer:
        return Verdict(bool(gold), "exact")
    option = gold_choice(gold)
    if option is not None:
        return _compare_choice(option.letter, option.text, answer)
    return _compare(gold, answer, 0)


def _compare_choice(letter: str, text: str, answer: str) -> Verdict:
    chosen = answer_choice(answer)
    if chosen is not None:
        if chosen.letter != letter:
            return Verdict(False, "choice")
        # The right letter followed by another number contradicts itself; other words may be a paraphrase.
        contradicts = text and chosen.text and _compare(clean(text), clean(chosen.text), 0)
        return Verdict(
            not (contradicts and contradicts.correct is False and contradicts.by in ("number", "unit")), "choice"
        )
    return _compare(clean(text), answer, 0) if text else Verdict(False, "choice")


def _compare(gold: str, answer: str, depth: int) -> Verdict:
    if depth > _MAX_NESTING:
        return Verdict(False, "too_complex")
    if squeeze(gold) == squeeze(answer):
        return Verdict(True, "exact")
    gold_words, answer_words = prose(gold), prose(answer)
    if gold_words is not None and answer_words is not None:
        return Verdict(gold_words == answer_words, "text")
    for rule in (_equation, _quantity, _union, _bracket, _list, _ratio, _infinity):
        verdict = rule(gold, answer, depth)
        if verdict is not None:
            return verdict
    return _formula(gold, answer)


def _equation(gold: str, answer: str, depth: int) -> Verdict | None:
    gold_sides, answer_sides = equality_chain(gold), equality_chain(answer)
    if len(gold_sides) == 1 and len(answer_sides) == 1:
        return None
    if len(gold_sides) + len(answer_sides) > _MAX_SIDES:
        return Verdict(False, "too_complex")
    if _RELATION.search(gold + answer) or "" in gold_sides + answer_sides or _listed(gold) or _listed(answer):
        return None
    if len(gold_sides) == 2 and len(answer_sides) == 2:
        (gold_name, gold_value), (answer_name, answer_value) = gold_sides, answer_sides
        if is_name(gold_name) and squeeze(gold_name) == squeeze(answer_name):
            return _compare(gold_value, answer_value, depth + 1)
        if is_name(gold_name) and is_name(answer_name) and not re.search("[A-Za-z]", gold_value + answer_value):
            return Verdict(False, "equation")
        return _formula(gold, answer)
    if len(gold_sides) > 1 and not is_name(gold_sides[0]):
        return _formula(gold, answer)
    value = gold_sides[-1]
    named = [side for side in answer_sides if not is_name(side)] or answer_sides[-1:]
    return all_of((_compare(value, side, depth + 1) for side in named), "equation")


def _listed(text: str) -> bool:
    """True when `text` is a list even if thousands groups are kept together."""
    return len(list_readings(text)[0]) > 1


def _many(text: str) -> bool:
    return any(len(reading) > 1 for reading in list_readings(text))


def _quantity(gold: str, answer: str, depth: int) -> Verdict | None:
    (gold_core, gold_unit), (answer_core, answer_unit) = split_unit(gold), split_unit(answer)
    gold_number, answer_number = parse_number(gold_core), parse_number(answer_core)
    if gold_unit and answer_unit and not gold_unit.agrees(answer_unit):
        return Verdict(False, "unit")
    if gold_number is None or answer_number is None:
        if gold_unit is None and answer_unit is None:
            return None
        if gold_unit and answer_unit and (gold_unit.scale, gold_unit.offset) != (answer_unit.scale, answer_unit.offset):
            return Verdict(False, "unit")
        return _compare(gold_core, answer_core, depth + 1) if (gold_core, answer_core) != (gold, answer) else None
    if gold_unit is None and answer_unit is None and same_number(gold_number, answer_number):
        return Verdict(True, "number")
    if gold_unit is None and answer_unit is None and (_many(gold) or _many(answer)):
        return None  # "1,234" may also be two values: the list rule decides
    return Verdict(
        _same_quantity(gold_number, gold_unit, answer_number, answer_unit),
        "number" if gold_unit == answer_unit else "unit",
    )


def _same_quantity(gold: Number, gold_unit: Unit | None, answer: Number, answer_unit: Unit | None) -> bool:
    if gold_unit and answer_unit:
        return same_number(_in_base(gold, gold_unit), _in_base(answer, answer_unit))
    if same_number(gold, answer):
        return True
    # A percentage also equals its hundredth: 50 % is 0.5.
    percent = [unit.dimension == (("percent", 1),) if unit else False for unit in (gold_unit, answer_unit)]
    return any(percent) and same_number(_share(gold, percent[0]), _share(answer, percent[1]))


def _in_base(number: Number, unit: Unit) -> Number:
    return Number(number.value * unit.scale + unit.offset, number.decimal)


def _share(number: Number, percent: bool) -> Number:
    return Number(number.value * (Fraction(1, 100) if percent else 1), number.decimal)


def _union(gold: str, answer: str, depth: int) -> Verdict | None:
    gold_parts, answer_parts = union_parts(gold), union_parts(answer)
    if len(gold_parts) <= 1 or len(answer_parts) <= 1:
        return None
    return _unordered(gold_parts, answer_parts, "union", depth) or _formula(gold, answer)


def _bracket(gold: str, answer: str, depth: int) -> Verdict | None:
    gold_frame, answer_frame = bracketed(gold), bracketed(answer)
    plain_gold, plain_answer = _group(gold_frame), _group(answer_frame)
    if plain_gold is not None or plain_answer is not None:
        return _compare(plain_gold or gold, plain_answer or answer, depth + 1)
    if gold_frame is None and answer_frame is None:
        return None
    if gold_frame is None or answer_frame is None:
        other = gold if gold_frame is None else answer
        return None if _RELATION.search(other) or _operates(other) else Verdict(False, "bracket")
    if (gold_frame[0], gold_frame[2]) != (answer_frame[0], answer_frame[2]):
        return Verdict(False, "bracket")
    gold_parts, answer_parts = _elements(gold_frame[1]), _elements(answer_frame[1])
    if gold_frame[0] == "{":
        return _unordered(gold_parts, answer_parts, "bracket", depth) or _formula(gold, answer)
    if len(gold_parts) != len(answer_parts):
        return Verdict(False, "bracket")
    return all_of((_compare(*pair, depth + 1) for pair in zip(gold_parts, answer_parts, strict=True)), "bracket")


def _elements(inside: str) -> list[str]:
    return list_readings(inside)[-1]  # inside brackets a comma always separates: (1,234) is a pair


def _group(frame: tuple[str, str, str] | None) -> str | None:
    """The content of round brackets that only group one value; None for everything else."""
    return (
        frame[1]
        if frame and frame[0] == "(" and frame[2] == ")" and frame[1] and len(_elements(frame[1])) == 1
        else None
    )


def _operates(text: str) -> bool:
    return (
        re.search(r"[0-9A-Za-z)\]}]\s*[-+*/^]\s*[0-9A-Za-z(\[{\\]|\\(?:frac|times|cdot|cup|cap|setminus)", text)
        is not None
    )


def _list(gold: str, answer: str, depth: int) -> Verdict | None:
    gold_readings, answer_readings = list_readings(gold), list_readings(answer)
    if not _many(gold) and not _many(answer):
        return None
    best: Verdict | None = None
    for gold_parts in gold_readings:
        for answer_parts in answer_readings:
            if len(gold_parts) != len(answer_parts) or len(gold_parts) == 1:
                continue
            verdict = _same_parts(gold_parts, answer_parts, depth)
            if verdict.correct:
                return verdict
            best = verdict if best is None or best.correct is False else best
    return best or Verdict(False, "list")


def _same_parts(gold: list[str], answer: list[str], depth: int) -> Verdict:
    letters = [[part.strip("()") for part in parts] for parts in (gold, answer)]
    if all(re.fullmatch("[A-H]", letter) for parts in letters for letter in parts):
        return Verdict(sorted(letters[0]) == sorted(letters[1]), "list")  # several chosen options have no order
    return all_of((_compare(*pair, depth + 1) for pair in zip(gold, answer, strict=True)), "list")


def _unordered(gold: list[str], answer: list[str], by: str, depth: int) -> Verdict | None:
    """Equality of two sets when rules alone decide it, None when math-verify is needed for some pair."""
    verdicts = [[_compare(left, right, depth + 1).correct for right in answer] for left in gold]
    columns = list(zip(*verdicts, strict=True))
    if all(True in row for row in verdicts) and all(True in column for column in columns):
        return Verdict(True, by)
    if any(all(cell is False for cell in line) for line in [*verdicts, *columns]):
        return Verdict(False, by)
    return None


def _ratio(gold: str, answer: str, depth: int) -> Verdict | None:
    gold_parts, answer_parts = ([part.strip() for part in re.split(r":|\\colon", text)] for text in (gold, answer))
    if len(gold_parts) == 1 and len(answer_parts) == 1:
        return None
    if len(gold_parts) != len(answer_parts) or not all(gold_parts + answer_parts):
        return Verdict(False, "ratio")
    return all_of((_compare(*pair, depth + 1) for pair in zip(gold_parts, answer_parts, strict=True)), "ratio")


def _infinity(gold: str, answer: str, depth: int) -> Verdict | None:
    found = [_INFINITY.fullmatch(text) for text in (gold, answer)]
    if found[0] and found[1]:
        return Verdict((found[0][1] or "+") == (found[1][1] or "+"), "infinity")
    return Verdict(False, "infinity") if any(found) else None


def _formula(gold: str, answer: str) -> Verdict:
    if not is_mathematical(gold) or not is_mathematical(answer):
        return Verdict(squeeze(gold).lower() == squeeze(answer).lower(), "text")
    if letter_runs(gold) != letter_runs(answer):
        return Verdict(False, "no_match")
    gold, answer = to_latex(gold), to_latex(answer)
    if refusal(gold) or refusal(answer):
        return Verdict(False, "too_complex")
    return ask([Probe(gold, answer, "latex")])
