"""Results of comparing two answers: a verdict, or a question for the math-verify workers.

The comparison rules are pure functions without processes. When a rule can decide, it returns `Verdict(True | False,
branch)`. When only symbolic mathematics can decide, it returns `Verdict(None, branch, question)`; the checker sends the
question to a worker and completes the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One call of math-verify: does `answer` equal `gold`? `method` names the way both are parsed (see `worker.py`)."""

    gold: str
    answer: str
    method: str


Question = tuple[tuple[Probe, ...], ...]
"""True when, in every inner tuple, at least one probe holds (a conjunction of disjunctions)."""


@dataclass(frozen=True)
class Verdict:
    """`correct` is None exactly when `question` must be asked; `by` names the branch that decided (or that asks)."""

    correct: bool | None
    by: str
    question: Question = ()

    def answered(self, holds: bool) -> Verdict:
        """The decided verdict once the workers have answered the question."""
        if self.correct is not None:
            raise ValueError(f"this verdict is already decided by {self.by!r}")
        return Verdict(holds, "no_match" if self.by == "math_verify" and not holds else self.by)


Inner = Callable[[str, str], Verdict]
"""Compares a part of the ground truth with a part of the answer, one level deeper."""


def ask(probes: Iterable[Probe], by: str = "math_verify") -> Verdict:
    """A verdict that waits for any of `probes` to hold."""
    return Verdict(None, by, (tuple(probes),))


def all_of(verdicts: Iterable[Verdict], by: str) -> Verdict:
    """True if all are; False if a decided one is False; otherwise the questions of all of them together."""
    questions: list[tuple[Probe, ...]] = []
    for verdict in verdicts:
        if verdict.correct is False:
            return Verdict(False, by)
        questions.extend(verdict.question)
    return Verdict(None, by, tuple(questions)) if questions else Verdict(True, by)
