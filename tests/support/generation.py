"""The embedded rollout engine as tests want it: a large budget, seeds made up, nobody polled."""

from __future__ import annotations

from collections.abc import Sequence

from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Completion, Sampling


def hf_engine(policy, processor, tokens: int = 1 << 20, told: list[str] | None = None) -> HFRollout:
    notify = (lambda text: None) if told is None else told.append
    return HFRollout(policy, processor, TokenBudget(tokens, notify=notify, piece="chunk of responses"))


def generate(policy, processor, prompts: Sequence, sampling: Sampling, *, seed: int = 0) -> list[list[Completion]]:
    seeds = [1000 * seed + i for i in range(len(prompts))]
    return hf_engine(policy, processor).generate(prompts, sampling, seeds, poll=lambda: None)
