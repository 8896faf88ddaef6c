"""A number that is not finite is named where it appears, before it reaches a weight."""

from __future__ import annotations

import copy

import pytest
import torch

from prism_fast.config import OptimizerConfig
from prism_fast.engine.finite import NonFiniteError, refuse_non_finite
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.protocol import Completion
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from tests.support.trainers import discriminate, update_policy


@pytest.fixture(scope="module")
def setup():
    processor = Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two of them")]
    return processor, policy, prompts


def _engine(model) -> LocalEngine:
    engine = LocalEngine(copy.deepcopy(model), OptimizerConfig(lr=1e-2))
    engine.where = "align step 7"
    return engine


def _assert_untouched(engine: LocalEngine, model) -> None:
    theirs = dict(model.named_parameters())
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name
    assert engine.updates == 0 and not engine.optimizer.state


def _update(engine: LocalEngine, setup, advantage: list[float]) -> None:
    processor, _, prompts = setup
    update_policy(
        engine,
        PolicyBatch(prompts, [0, 1], [Completion((5, 6, 7), (-1.0,) * 3, 1.0, "stop")] * 2, torch.tensor(advantage)),
        PolicyLossOptions("grpo"),
        temperature=1.0,
        pad_id=processor.pad_id,
        budget=TokenBudget(10_000, notify=pytest.fail),
        layout="padded",
    )


def test_log_probs_of_a_spoiled_policy(setup):
    spoiled = copy.deepcopy(setup[1])
    with torch.no_grad():
        spoiled.model.language_model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    engine = _engine(spoiled)
    with pytest.raises(NonFiniteError, match=r"align step 7, micro-batch 1 of 1: .*loss.*logp \(6 of 6, first nan"):
        _update(engine, setup, [1.0, -1.0])
    assert all(p.grad is None for p in engine.masters.values()), "no gradient is left"
    _assert_untouched(engine, spoiled)


def test_an_advantage(setup):
    engine = _engine(setup[1])
    with pytest.raises(NonFiniteError, match=r"align step 7: not finite: advantage \(1 of 2, first inf at \[1\]\)"):
        _update(engine, setup, [1.0, float("inf")])
    _assert_untouched(engine, setup[1])


def test_a_gradient_names_its_parameters(setup):
    engine = _engine(setup[1])
    bad = engine.module.model.language_model.layers[0].mlp.down_proj.weight
    bad.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"align step 7: the gradient norm is .*layers\.0\.mlp\.down_proj\.weight"):
        _update(engine, setup, [1.0, -1.0])
    _assert_untouched(engine, setup[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_of_a_spoiled_discriminator(setup, value):
    """An infinite score passes through the clip of the loss as a finite one; it is refused all the same."""
    processor, policy, prompts = setup
    spoiled = build_discriminator(policy, seed=1)
    with torch.no_grad():
        spoiled.v_head[1].weight[0, 0] = value
    engine = _engine(spoiled)
    group = ScoredGroup(prompts[0], ((5, 6, 7), (8, 9)), [((5, 6), (9,)), ((7,), (8, 9))])
    with pytest.raises(NonFiniteError, match=r"align step 7, .*teacher_scores .*student_scores"):
        discriminate(
            engine,
            [group],
            TokenBudget(10_000, notify=pytest.fail),
            learn=True,
            pad_id=processor.pad_id,
            semantics="prism_fast",
            score_clip=10.0,
            score_reg=0.001,
            layout="padded",
        )
    _assert_untouched(engine, spoiled)


def test_what_is_finite_is_not_refused():
    refuse_non_finite("here", a=torch.zeros(3), b=torch.ones(()), c=torch.empty(0))
    with pytest.raises(
        NonFiniteError, match=r"^here: not finite: a \(2 of 4, first -inf at \[0, 1\]\), b \(1 of 1: nan\)$"
    ):
        a = torch.tensor([[1.0, -torch.inf], [torch.nan, 0.0]])
        refuse_non_finite("here", a=a, b=torch.tensor(torch.nan), c=torch.zeros(2))
