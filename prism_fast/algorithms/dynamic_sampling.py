"""Dynamic sampling: train only on groups with a gradient, and generate until there are enough of them.

Source: DAPO (arXiv 2503.14476, section 3.2). The published code drops the surplus of a round and generates a fixed
multiple of the prompts; here the surplus goes into the next step, and the multiple follows the observed share.
"""

from __future__ import annotations

import math

from torch import Tensor

# Factor of the weight of earlier rounds per round of generation: a policy changes over tens of steps.
DECAY = 0.8
PRIOR = (1.0, 0.5)  # pseudo-counts of groups and of useful ones before the first round; keeps the share above 0
CONFIDENCE = 1.0  # standard deviations of reserve: one round gives enough in about 84 of 100 steps


def useful_groups(reward: Tensor, group: Tensor, count: int) -> Tensor:
    """[count] bool: the rewards of the group are not all equal, so its advantages are not all zero.

    Equal means equal to the bit. A test for a deviation above 0 would fail: that of seven rewards of 0.9 is 1e-16.

    Args:
        reward: [B] floating.
        group: [B] int64 ids in [0, count); a group without a row is not useful.
    """
    low = reward.new_full((count,), math.inf).scatter_reduce(0, group, reward, "amin")
    high = reward.new_full((count,), -math.inf).scatter_reduce(0, group, reward, "amax")
    return low < high


class UsefulShare:
    """Running share of useful groups, and the number of groups to generate for enough useful ones."""

    def __init__(self) -> None:
        self.generated, self.useful = 0.0, 0.0

    def observe(self, generated: int, useful: int) -> None:
        """Record one round of generation; earlier rounds lose weight."""
        if not 0 <= useful <= generated:
            raise ValueError(f"useful={useful} must be between 0 and generated={generated}")
        self.generated = DECAY * self.generated + generated
        self.useful = DECAY * self.useful + useful

    @property
    def share(self) -> float:
        """Between 0 and 1, both excluded."""
        return (self.useful + PRIOR[1]) / (self.generated + PRIOR[0])

    def to_generate(self, missing: int) -> int:
        """Smallest m for which m * share minus ``CONFIDENCE`` standard deviations reaches ``missing``.

        With p the share the deviation is sqrt(m p (1 - p)); the condition is quadratic in sqrt(m).
        """
        if missing < 1:
            return 0
        p = self.share
        reserve = CONFIDENCE * math.sqrt(p * (1.0 - p))
        return math.ceil(((reserve + math.sqrt(reserve * reserve + 4.0 * p * missing)) / (2.0 * p)) ** 2)

    def state_dict(self) -> dict[str, float]:
        return {"generated": self.generated, "useful": self.useful}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.generated, self.useful = float(state["generated"]), float(state["useful"])
