"""A reward function of your own: the exact answer, worth a little less for every hundred characters of response.

    PYTHONPATH=examples prism-fast run RECIPE 'reward.functions={brief: "own_reward:exact_and_brief"}'

grades the rows whose `data_source` is `brief`; `prism-fast data check FILE --data-source brief` accepts them.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_fast.rewards import Judged, Reward


def exact_and_brief(responses: Sequence[Judged]) -> list[Reward]:
    """One reward per response, in order."""
    return [_reward(response) for response in responses]


def _reward(response: Judged) -> Reward:
    before, opened, rest = response.text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    if not (opened and closed):
        return Reward(score=0.0, accuracy=0.0, format=0.0, decided_by="no_answer")
    right = answer.strip() == response.ground_truth.strip()
    brief = 1.0 / (1.0 + len(before) / 100)
    return Reward(score=float(right) * (0.5 + 0.5 * brief), accuracy=float(right), format=1.0, decided_by="exact")
