"""A plain reward function, with the signature that TRL's users know.

    PYTHONPATH=examples prism-fast run RECIPE 'reward.functions={counted: "plain_reward:close_and_short"}'

grades the rows whose `data_source` is `counted`. It gets lists with one entry per response: `prompts`, `completions`,
`solution` and the other columns of the rows. It gives one number each, None where it does not apply, or a mapping whose
further numbers appear in metrics (`reward/parts/close`), rollout dumps and the report (TRL itself takes no mapping).
"""

from __future__ import annotations

import re


def close_and_short(completions, solution, **kwargs) -> list[dict[str, float] | None]:
    """Half of the reward for a number near the solution, half of it for a short text."""
    rewards = []
    for completion, truth in zip(completions, solution, strict=True):
        text = completion[0]["content"]
        wanted, found = re.search(r"\d{1,9}", truth), re.findall(r"\d{1,9}", text)
        if wanted is None:  # not a row with a number: no reward applies
            rewards.append(None)
            continue
        close = 1.0 / (1.0 + abs(int(found[-1]) - int(wanted[0]))) if found else 0.0
        short = 1.0 / (1.0 + len(text) / 200)
        score = 0.5 * close + 0.5 * short * (close == 1.0)
        rewards.append({"score": score, "accuracy": float(close == 1.0), "close": close, "short": short})
    return rewards
