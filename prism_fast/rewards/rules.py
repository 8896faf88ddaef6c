"""Rules of grading by the name that ``AnswerChecker(semantics=)`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_fast.data.grammar import split_text
from prism_fast.rewards.compare import compare
from prism_fast.rewards.routes import NO_EQUIVALENT, Route
from prism_fast.rewards.verdict import Verdict


@dataclass(frozen=True)
class Rules:
    """``read``: the answer of a response, for a judge. ``grade``: of (route, response text, ground truth, equivalent
    answers, max_answer_chars) the format, 0 or 1, and one verdict per acceptable ground truth."""

    read: Callable[[str], str]
    grade: Callable[[Route, str, str, Sequence[str], int], tuple[float, tuple[Verdict, ...]]]


def accepted_answers(gold: str, equivalents: Sequence[str]) -> list[str]:
    """The ground truth and the equivalents, each once, without placeholders."""
    real = (other for other in equivalents if other.strip() not in ("", NO_EQUIVALENT))
    return list(dict.fromkeys([gold, *real]))


def _answer(text: str) -> str:
    return split_text(text).answer


def _grade(
    route: Route, text: str, gold: str, equivalents: Sequence[str], max_answer_chars: int
) -> tuple[float, tuple[Verdict, ...]]:
    """The default rules; all routes are graded alike."""
    split = split_text(text)
    if not split.valid:
        return 0.0, (Verdict(False, "bad_format"),)
    if len(split.answer) >= max_answer_chars:
        return 1.0, (Verdict(False, "overlong_answer"),)
    return 1.0, tuple(compare(accepted, split.answer) for accepted in accepted_answers(gold, equivalents))


def _released() -> Rules:
    from prism_fast.released import graders  # imported late: it imports this package

    return Rules(graders.first_answer, graders.judge_published)


RULES: dict[str, Callable[[], Rules]] = {"prism_fast": lambda: Rules(_answer, _grade), "released": _released}
