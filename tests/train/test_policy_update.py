"""The policy update against formulas written here: tokens that cannot be sampled, the published way of dividing."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion, Sampling
from prism_fast.train.policy_trainer import PolicyBatch
from tests.support.generation import generate
from tests.support.trainers import update_policy

TEMPERATURE = 1.3
ADVANTAGE = torch.tensor([0.5, -1.0, 0.0, 1.5, -0.3, 0.7])


@pytest.fixture(scope="module")
def setup():
    """A policy that puts a fifth of its mass on vision tokens, and six responses that it sampled."""
    processor = Processor.build(train_tokenizer(["the sum is 4"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two words")]
    with torch.no_grad():
        policy.lm_head.weight[list(processor.banned_ids)] *= 3.0
    groups = generate(policy, processor, prompts, Sampling(3, TEMPERATURE, 9), seed=1)
    cut = zip([c for group in groups for c in group], (3, 9, 5, 1, 7, 9), strict=True)
    return (
        policy,
        processor,
        prompts,
        [Completion(c.token_ids[:k], c.logprobs[:k], c.entropy, "length") for c, k in cut],
    )


def update(setup, *, loss="prism", budget=10_000, layout="padded", **options):
    policy, processor, prompts, completions = setup
    engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
    engine.step = lambda: Update(0.0, 0.0)  # the weights stay, the gradients too
    numbers = update_policy(
        engine,
        PolicyBatch(prompts, [0, 0, 0, 1, 1, 1], completions, ADVANTAGE),
        policy_options(loss, max_response=9),
        temperature=TEMPERATURE,
        pad_id=processor.pad_id,
        budget=TokenBudget(budget, notify=pytest.fail),
        layout=layout,
        **options,
    )
    gradient = policy.lm_head.weight.grad.clone()
    engine.discard()
    return numbers, gradient


def test_the_policy_that_learns_is_the_one_that_sampled(setup):
    banned = setup[1].banned_ids
    numbers, gradient = update(setup, banned=banned)
    assert numbers["rollout/logprob_gap_max"] < 1e-5
    assert update(setup)[0]["rollout/logprob_gap_max"] > 1e-3, "what the ban is about does not show here"
    assert gradient.isfinite().all() and not torch.equal(gradient, update(setup)[1])


@pytest.mark.parametrize("loss", ["prism", "gspo"])
def test_as_released_each_micro_batch_is_divided_by_its_own_counts(setup, loss):
    """On-policy, the loss of a row is minus its advantage per token (prism) or per response (gspo)."""
    lengths = torch.tensor([float(len(c.token_ids)) for c in setup[3]])
    whole = {"prism": -(ADVANTAGE * lengths).sum() / lengths.sum(), "gspo": -ADVANTAGE.mean()}[loss]
    for by_micro_batch, budget, expected in (
        (True, 10_000, whole),
        (True, 1, -ADVANTAGE.mean()),  # a row each: its own mean, one sixth of the weight
        (False, 10_000, whole),
        (False, 1, whole),
    ):
        numbers, _ = update(setup, loss=loss, budget=budget, divide_by_micro_batch=by_micro_batch)
        assert numbers["policy/loss"] == pytest.approx(float(expected), abs=1e-5), (by_micro_batch, budget)
        assert numbers["policy/rows"] == (6 if by_micro_batch else 5)
