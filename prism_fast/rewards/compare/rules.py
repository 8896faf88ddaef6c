"""The comparison itself: normalise both sides, read them by type, compare by the first type that applies.

Every branch has a name (`Verdict.by`): `not_a_number`, `exact`, `choice`, `text`, `moment`, `matrix`, `number`, `unit`,
`condition`, `region`, `relation`, `equation`, `bracket`, `list`, `ratio`, `infinity`, `too_complex`, `math_verify`,
`no_match`. A type that only one side has contradicts the other and is wrong, unless the specification (ANSWERS.md)
says otherwise. Rules are pure functions; only real algebra becomes a question for the workers.
"""

from __future__ import annotations

import re
from functools import partial

from prism_fast.rewards.compare import measures, regions, relations, sequences
from prism_fast.rewards.compare.choices import answer_choice, gold_choice, several
from prism_fast.rewards.compare.formulas import formulas, is_formula
from prism_fast.rewards.compare.leads import bare
from prism_fast.rewards.compare.numbers import parse_number, same_number
from prism_fast.rewards.compare.quantities import read_quantities
from prism_fast.rewards.compare.structure import is_list, open_cases
from prism_fast.rewards.compare.typography import typeset
from prism_fast.rewards.compare.words import label, matter, prose, squeeze, verdict_word
from prism_fast.rewards.verdict import Inner, Verdict

_NAN = re.compile(r"(?:^|[\s,;=(\[{])[-+]?nan(?:$|[\s,;)\]}])", re.IGNORECASE)
_POINT = re.compile(r"([A-Z])('?)\s*(\([^()]*,[^()]*\))")
_MAX_NESTING = 12


def compare(gold: str, answer: str) -> Verdict:
    """Whether `answer` is the same answer as `gold` (both raw text). Never evaluates either; undecided formulas come
    back as a question."""
    gold, answer = normalise(gold), normalise(answer)
    if _NAN.search(gold) or _NAN.search(answer):
        return Verdict(False, "not_a_number")
    if gold == answer:
        return Verdict(bool(gold), "exact")
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1] and "," not in gold + answer:
        return Verdict(same_number(*numbers), "number")
    if (chosen := several(gold)) is not None and (verdict := _several(chosen, gold, answer)) is not None:
        return verdict
    option = gold_choice(gold)
    if option is not None:
        return _choice(option.letter, option.text, answer)
    return _compare(gold, answer, 0)


def normalise(text: str) -> str:
    """`text` in one typography, without what people write around an answer."""
    text = bare(typeset(text))
    if "\\begin" in text:
        text = bare(open_cases(text))
    if found := _POINT.fullmatch(text):
        text = f"{found[1]}{found[2]} = {found[3]}"
    return text


def _several(gold: tuple[str, bool], raw: str, answer: str) -> Verdict | None:
    """Several chosen options. Letters that stand together on both sides must have the same order: they may be a
    name."""
    letters, apart = gold
    chosen = several(answer)
    if chosen is None:
        return Verdict(False, "choice") if apart else None
    if apart or chosen[1]:
        if not apart and len(letters) == 2 and re.fullmatch("[A-J] [A-J]", answer):
            return Verdict(False, "choice")
        return Verdict(sorted(letters) == sorted(chosen[0]), "choice")
    return Verdict(letters == chosen[0], "choice")


def _choice(letter: str, text: str, answer: str) -> Verdict:
    chosen = answer_choice(answer)
    if chosen is not None:
        if chosen.letter != letter:
            return Verdict(False, "choice")
        # The right letter followed by another number contradicts itself; other words may be a paraphrase.
        contradicts = text and chosen.text and _compare(normalise(text), normalise(chosen.text), 0)
        return Verdict(
            not (contradicts and contradicts.correct is False and contradicts.by in ("number", "unit")), "choice"
        )
    return _compare(normalise(text), answer, 0) if text else Verdict(False, "choice")


def _compare(gold: str, answer: str, depth: int) -> Verdict:
    if depth > _MAX_NESTING:
        return Verdict(False, "too_complex")
    if not gold or not answer:
        return Verdict(False, "text")
    if squeeze(gold) == squeeze(answer):
        return Verdict(True, "exact")
    inner = partial(_compare, depth=depth + 1)
    for rule in _RULES:
        verdict = rule(gold, answer, inner)
        if verdict is not None:
            return verdict
    return Verdict(False, "no_match")


def _words(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_words, answer_words = prose(gold), prose(answer)
    if (gold_words and verdict_word(answer) == gold_words) or (answer_words and verdict_word(gold) == answer_words):
        return Verdict(True, "text")
    if gold_words is not None and answer_words is not None:
        if gold_words == answer_words:
            return Verdict(True, "text")
        if any(read_quantities(text) for text in (gold, answer)) or is_list(gold) or is_list(answer):
            return None
        if regions.is_empty_set(gold) or regions.is_empty_set(answer):
            return None
        return Verdict(False, "text")
    labels = label(gold), label(answer)
    if labels[0] is not None and labels[0] == labels[1]:
        return Verdict(True, "text")
    matters = matter(gold), matter(answer)
    return None if None in matters else Verdict(matters[0] == matters[1], "text")


def _formula(gold: str, answer: str, inner: Inner) -> Verdict:
    verdict = formulas(gold, answer)
    if verdict is not None:
        return verdict
    return Verdict(squeeze(gold).lower() == squeeze(answer).lower() and not is_formula(gold), "text")


_RULES = (
    _words,
    measures.moment,
    sequences.matrix,
    measures.quantity,
    relations.condition,
    relations.region,
    relations.equation,
    sequences.bracket,
    sequences.listing,
    measures.ratio,
    measures.infinity,
    _formula,
)
