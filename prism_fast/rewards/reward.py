"""Arguments and results of reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_FAILURES = {"timeouts": "timeout", "worker_deaths": "worker_died", "judge_errors": "judge_error"}


@dataclass(frozen=True)
class Judged:
    """One response to score: its decoded text without special tokens, and fields of its task."""

    text: str
    ground_truth: str
    data_source: str
    equivalent_answers: tuple[str, ...] = ()
    question: str = ""


@dataclass(frozen=True)
class Reward:
    """The verdict on one response.

    ``score``: the reward, any finite number. ``accuracy``: above 0 where the answer is right (RLVR's and evaluation's
    accuracy, the gates of ``align.advantage``); ``format``: 1 where the response has the wanted form, else 0.
    ``decided_by``: a name for reports and counts, such as the rule that decided.
    """

    score: float
    accuracy: float
    format: float
    decided_by: str


class RewardFunction(Protocol):
    """One reward per response, in order.

    The same responses give the same rewards, alone or among others. A text may be anything a model writes: nothing in
    it raises, and none takes unbounded time. ``tests/contracts/reward.py`` checks all that.
    """

    def __call__(self, responses: Sequence[Judged], /) -> list[Reward]: ...


def failures(rewards: Sequence[Reward]) -> dict[str, int]:
    """The number of rewards that are 0 only because checking failed, by kind; logged so that none passes unseen."""
    return {name: sum(reward.decided_by == by for reward in rewards) for name, by in _FAILURES.items()}
