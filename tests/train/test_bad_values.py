"""A response token that the output matrix does not have stops the update by name, before any weight changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prism_fast import ops
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.engine.finite import NonFiniteError
from prism_fast.engine.local import LocalEngine
from prism_fast.models.logprob_head import LogProbHead
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.train.policy_trainer import PolicyBatch
from tests.support.trainers import update_policy


def test_named_and_nothing_updated():
    processor = Processor.build(train_tokenizer(["the sum is 4"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=1), seed=4)
    prompts = [processor.encode_prompt([{"role": "user", "content": "one"}], [])]
    policy.lm_head = LogProbHead.take_over(nn.Linear(policy.config.text_config.hidden_size, 90, bias=False))
    before = {name: p.clone() for name, p in policy.named_parameters()}

    def update(*ids: int) -> dict:
        engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
        return update_policy(
            engine,
            PolicyBatch(prompts, [0], [Completion(ids, (-1.0,) * len(ids), 1.0, "stop")], torch.ones(1)),
            policy_options("grpo", max_response=6),
            temperature=1.0,
            pad_id=processor.pad_id,
            budget=TokenBudget(1000, notify=pytest.fail),
            layout="padded",
        )

    with pytest.raises(NonFiniteError, match="2 response tokens lie outside the 90 rows of the output matrix"):
        update(5, 95, 7, 90)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    ops.selected_logprob(torch.zeros(1, 3), torch.tensor([7]))  # somebody else's is not this step's
    assert update(5, 89, 7)["policy/bad_values"] == 0
