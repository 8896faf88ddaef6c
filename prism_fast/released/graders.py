"""The published graders of all data sources with their format gates (`semantics="released"`).

The first `<answer>` anywhere is graded, even one inside the caption or the reasoning. `mm_gad` ignores equivalent
answers; `mm_gad_llm` has no rules, a judge decides alone; the math sources accept equivalent answers, unless one of
them is `__EMPTY__`; geometry3k has a loose format and grades the answer whether or not the format holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_fast.data.grammar import TAGS, split_text
from prism_fast.released.geo3k import compare_geo3k
from prism_fast.released.mm_gad import compare_mm_gad
from prism_fast.rewards.routes import NO_EQUIVALENT, Route
from prism_fast.rewards.verdict import Probe, Verdict, ask


def judge_published(
    route: Route, text: str, gold: str, equivalents: Sequence[str], max_answer_chars: int
) -> tuple[float, tuple[Verdict, ...]]:
    """(format 0 or 1, one verdict per acceptable ground truth) of a response under the published rules."""
    answer = first_answer(text)
    if route.rules == "geo3k":
        return float(_loose_format(text)), (compare_geo3k(gold, answer),)
    if not split_text(text, published=True).valid:
        return 0.0, (Verdict(False, "bad_format"),)
    if not answer:
        return 1.0, (Verdict(False, "empty_answer"),)
    if len(answer) >= max_answer_chars:
        return 1.0, (Verdict(False, "overlong_answer"),)
    if route.rules == "judge":
        return 1.0, (Verdict(False, "no_rule"),)
    if route.rules == "mm_gad":
        return 1.0, (compare_mm_gad(gold, answer),)
    golds = [gold] if NO_EQUIVALENT in equivalents else [gold, *equivalents]
    return 1.0, tuple(ask([Probe(accepted, answer, "boxed")]) for accepted in golds)


def first_answer(text: str) -> str:
    """The stripped inside of the first `<answer>…</answer>`, empty when there is none."""
    start = text.find("<answer>")
    end = text.find("</answer>", start + 1)
    return text[start + len("<answer>") : end].strip() if 0 <= start < end else ""


def _loose_format(text: str) -> bool:
    """True when the six tags occur in order, with any text around and between them."""
    position = 0
    for tag in TAGS:
        position = text.find(tag, position)
        if position < 0:
            return False
        position += len(tag)
    return True
