"""Arguments and results of reward functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_FAILURES = {"timeouts": "timeout", "worker_deaths": "worker_died", "judge_errors": "judge_error"}


@dataclass(frozen=True)
class Judged:
    """One response to score: its decoded text without special tokens, and fields of its task.

    ``messages``: the prompt's chat turns, as in ``data.samples``; ``columns``: the task's other fields by name.
    """

    text: str
    ground_truth: str
    data_source: str
    equivalent_answers: tuple[str, ...] = ()
    question: str = ""
    uid: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """The verdict on one response.

    ``score``: the reward, any finite number; None: no reward applies to this response, so RLVR leaves it out of its
    group and learns nothing from it. ``accuracy``: above 0 where the answer is right (RLVR's and evaluation's
    accuracy, the gates of ``align.advantage``); ``format``: 1 where the response has the wanted form, else 0.
    ``decided_by``: a name for reports and counts, such as the rule that decided. ``parts``: further finite numbers by
    name, for metrics (``reward/parts/NAME``), rollout dumps and the report; nothing is learnt from them.
    """

    score: float | None
    accuracy: float
    format: float
    decided_by: str
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardResultError(ValueError):
    """A reward function gives something else than it must, or is given too little."""


class RewardFunction(Protocol):
    """One reward per response, in order.

    The same responses give the same rewards, alone or among others. A text may be anything a model writes: nothing in
    it raises, and none takes unbounded time. ``tests/contracts/reward.py`` checks all that.
    """

    def __call__(self, responses: Sequence[Judged], /) -> list[Reward]: ...


def place_of(responses: Sequence[Judged], index: int) -> str:
    """Where response ``index`` of a batch belongs, for messages."""
    response = responses[index]
    row = f"row {response.uid!r}, " if response.uid else ""
    return f"{row}response {index + 1} of {len(responses)} ({response.text!r:.80})"


def summed_parts(rewards: Sequence[Reward]) -> dict[str, tuple[float, int]]:
    """By name of a part its sum over the rewards that have it, and their number."""
    found: dict[str, list[float]] = {}
    for reward in rewards:
        for name, value in reward.parts.items():
            found.setdefault(name, []).append(value)
    return {name: (math.fsum(values), len(values)) for name, values in sorted(found.items())}


def failures(rewards: Sequence[Reward]) -> dict[str, int]:
    """The number of rewards that are 0 only because checking failed, by kind; logged so that none passes unseen.
    ``unscored``: rewards without a score, where there are any."""
    counts = {name: sum(reward.decided_by == by for reward in rewards) for name, by in _FAILURES.items()}
    unscored = sum(reward.score is None for reward in rewards)
    return counts | ({"unscored": unscored} if unscored else {})
