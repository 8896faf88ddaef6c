"""Parts of an alignment step: advantages under both semantics, shared spans, micro-batch invariance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig, load_config
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rewards import Reward
from prism_fast.rollout.protocol import Completion
from prism_fast.train.align import step_advantage
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from tests.support.trainers import score_and_learn, update_policy


def _rollouts(valid: list[bool], group: list[int]):
    return SimpleNamespace(
        tasks=range(max(group) + 1),
        group=torch.tensor(group),
        splits=[SimpleNamespace(valid=v) for v in valid],
        rewards=[Reward(float(v), float(v), float(v), "rule") for v in valid],
    )


def test_an_invalid_response_does_not_squeeze_the_valid_ones():
    rollouts = _rollouts([True, True, False, True], [0, 0, 0, 0])
    scores = torch.tensor([[1.0, 2.0], [1.1, 2.2], [0.0, 0.0], [1.2, 2.1]])
    ours = step_advantage(load_config("digits"), rollouts, scores)[0]
    alone = step_advantage(load_config("digits"), _rollouts([True] * 3, [0, 0, 0]), scores[[0, 1, 3]])[0]
    torch.testing.assert_close(ours[[0, 1, 3]], alone)
    assert ours[2] == -1.5
    published = step_advantage(load_config("digits", ["semantics=released"]), rollouts, scores)[0]
    assert published[[0, 1, 3]].min() > 0 and published[2] < -2.5, "a floor in raw units: all valid ones look good"


def test_a_group_without_a_valid_response_has_nothing_to_compare():
    rollouts = _rollouts([False, False, True, True], [0, 0, 1, 1])
    scores = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert step_advantage(load_config("digits"), rollouts, scores)[0][:2].tolist() == [0.0, 0.0]
    published = step_advantage(load_config("digits", ["semantics=released"]), rollouts, scores)[0]
    assert published[:2].tolist() == [-1.5, -1.5]


@pytest.fixture(scope="module")
def small_discriminator():
    processor = Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=0)
    discriminator = build_discriminator(policy, seed=1).double()
    prompts = [
        processor.encode_prompt([{"role": "user", "content": text}], [])
        for text in ("one", "two words", "three of them")
    ]
    return discriminator, processor, prompts


def _groups(prompts, *, valid=True):
    def span(*ids: int):
        return tuple(ids)

    return [
        ScoredGroup(prompts[0], (span(5, 6, 7), span(8, 9)), [(span(5, 6, 7), span(9)), (span(7), span(8, 9))]),
        ScoredGroup(
            prompts[1], (span(11), span(12, 13)), [(span(14, 15, 16), span(17)), None if valid else (span(1), span(2))]
        ),
        ScoredGroup(prompts[2], (span(20, 21), span(22)), [None, None]),
    ]


def _step(small_discriminator, groups, *, budget=10_000, semantics="prism_fast"):
    discriminator, processor, _ = small_discriminator
    options = {"semantics": semantics, "layout": "padded", "pad_id": processor.pad_id}
    scores = score_and_learn(discriminator, groups, tokens=budget, **options)
    return scores, scores.loss, {n: p.grad.clone() for n, p in discriminator.named_parameters() if p.grad is not None}


def test_equal_spans_are_computed_once_and_tie_exactly(small_discriminator):
    groups = _groups(small_discriminator[2])
    assert [len(group.spans()) for group in groups] == [4, 4, 2]
    scores, _, _ = _step(small_discriminator, groups)
    assert scores.tokens == sum(len(g.prompt.input_ids) + len(span) for g in groups for span in g.spans())
    assert scores.student[0, 0] == scores.teacher[0, 0] and scores.student[1, 1] == scores.teacher[0, 1]
    assert scores.student[3:].abs().max() == 0


def test_under_released_the_cut_matters_as_published(small_discriminator):
    groups = _groups(small_discriminator[2])
    assert (
        _step(small_discriminator, groups, semantics="released")[1]
        != _step(small_discriminator, groups, budget=1, semantics="released")[1]
    )


def test_a_step_without_any_advantage_updates_nothing(small_discriminator):
    _, processor, prompts = small_discriminator
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
    numbers = update_policy(
        engine,
        PolicyBatch(prompts, [0, 1], [Completion((5, 6), (0.0, 0.0), 1.0, "stop")] * 2, torch.zeros(2)),
        policy_options("grpo", max_response=12),
        temperature=1.0,
        pad_id=processor.pad_id,
        budget=TokenBudget(100, notify=pytest.fail),
        layout="padded",
    )
    assert numbers["policy/rows"] == 0 and "policy/grad_norm" not in numbers and engine.updates == 0
    assert all(torch.equal(before[n], p) for n, p in policy.named_parameters())
