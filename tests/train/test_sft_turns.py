"""Demonstrations of several turns: the last assistant turn, or each."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from prism_fast.data.samples import Demonstration
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.train.layouts import use_layout
from prism_fast.train.sft import by_turn, encode
from tests.support.small_policy import SMALL
from tests.support.trainers import update_sft


@pytest.fixture
def demo() -> Demonstration:
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 256, (64, side, 3), dtype=np.uint8)) for side in (32, 64)]
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "digits?"}]},
        {"role": "assistant", "content": "1 2"},
        {"role": "user", "content": [{"type": "text", "text": "and here?"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": "sum?"},
    ]
    return Demonstration("a", messages, "the sum is 6", images)


def test_each_turn_follows_those_before_it(demo, processor):
    parts = list(by_turn(demo))
    assert [(part.response, len(part.messages), len(part.images)) for part in parts] == [
        ("1 2", 1, 1),
        ("3", 3, 2),
        ("the sum is 6", 5, 2),
    ]
    last, (first, second, third) = encode([demo], processor), encode([demo], processor, "all")
    assert last[0].prompt.input_ids == third.prompt.input_ids and last[0].branches == third.branches
    whole = third.prompt.input_ids
    for group in (first, second):  # an earlier turn is learned as the later ones see it
        ids = (*group.prompt.input_ids, *group.branches[0])
        assert whole[: len(ids)] == ids


def test_the_loss_is_the_mean_over_the_tokens_of_all_turns(demo, processor):
    policy = build_tiny_policy(processor, SMALL, seed=3)
    use_layout("shared_prefix", policy)

    def loss(groups) -> dict[str, float]:
        engine = LocalEngine(copy.deepcopy(policy), OptimizerConfig(lr=1e-3))
        budget = TokenBudget(10_000, notify=pytest.fail)
        return update_sft(engine, groups, budget, layout="shared_prefix", pad_id=processor.pad_id)

    groups = encode([demo], processor, "all")
    found, each = loss(groups), [loss([group]) for group in groups]
    tokens = torch.tensor([len(group.branches[0]) for group in groups], dtype=torch.float64)
    losses = torch.tensor([one["sft/loss"] for one in each], dtype=torch.float64)
    assert found["sft/tokens"] == tokens.sum()
    assert found["sft/loss"] == pytest.approx(float((tokens * losses).sum() / tokens.sum()), rel=1e-5)
