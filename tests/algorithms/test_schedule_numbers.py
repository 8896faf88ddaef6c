"""Overlong penalty, loss denominators and presets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.algorithms.overlong import overlong_penalty
from prism_fast.algorithms.presets import PRESETS, policy_options, reward_normalization
from prism_fast.ops import PolicyLossOptions, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES, OF_LOSS
from tests.ops.golden import load

OVERLONG = load("overlong")["cases"]


def test_overlong_vectors():
    settings = {(case["max_resp_len"], case["buffer_len"], case["penalty_factor"]) for case in OVERLONG}
    for max_length, buffer, factor in settings:
        cases = [
            c
            for c in OVERLONG
            if (c["max_resp_len"], c["buffer_len"], c["penalty_factor"]) == (max_length, buffer, factor)
        ]
        length = torch.tensor([case["response_len"] for case in cases])
        found = overlong_penalty(length, max_length=max_length, buffer=buffer, factor=factor)
        wanted = torch.tensor([case["overlong_reward"] for case in cases])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert (found < 0).tolist() == [case["overlong"] for case in cases]
        rewards = found + torch.tensor([case["rule_score"] for case in cases])
        torch.testing.assert_close(rewards, torch.tensor([case["reward"] for case in cases]), rtol=0, atol=1e-6)


def test_overlong_edges():
    length = torch.tensor([0, 4096, 4097, 6144, 8192, 9000])
    found = overlong_penalty(length, max_length=8192, buffer=4096)
    torch.testing.assert_close(found, -(length - 4096).clamp(min=0) / 4096)
    for bad in ({"max_length": 10, "buffer": 0}, {"max_length": 10, "buffer": 11}, {"max_length": 0, "buffer": 1}):
        with pytest.raises(ValueError, match="overlong_penalty: buffer="):
            overlong_penalty(length, **bad)
    with pytest.raises(ValueError, match="factor=-1.0 must not be negative"):
        overlong_penalty(length, max_length=10, buffer=5, factor=-1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_denominator_equals_what_one_call_counts_itself(loss, generator):
    mask = torch.rand(15, generator=generator) > 0.5
    cu_seqlens = torch.tensor([0, 4, 4, 9, 10, 15], dtype=torch.int32)
    mask[9] = False  # one sequence has tokens, but none that counts
    lengths = torch.tensor([int(mask[a:b].sum()) for a, b in ((0, 4), (4, 4), (4, 9), (9, 10), (10, 15))])
    arguments = (torch.randn(15, generator=generator), torch.randn(5, generator=generator), cu_seqlens)
    for aggregation in OF_LOSS[loss]:
        options = {"loss": loss, "aggregation": aggregation, "mask": mask}
        options["norm_length"] = 9.0 if aggregation == "seq_mean_token_sum_norm" else None
        denominator = loss_denominator(loss, lengths, aggregation=aggregation)
        assert denominator.shape == () and denominator == (
            mask.sum() if aggregation == "token_mean" else (lengths > 0).sum()
        )
        assert policy_loss(*arguments, denominator=denominator, **options)[0] == policy_loss(*arguments, **options)[0]
    assert loss_denominator(loss, lengths) == loss_denominator(loss, lengths, aggregation=OF_LOSS[loss][0])


def test_denominator_refusals():
    with pytest.raises(ValueError, match="loss='ppo' is not one of"):
        loss_denominator("ppo", torch.ones(2))
    with pytest.raises(ValueError, match="loss='dapo' with aggregation='seq_mean_token_mean': not what"):
        loss_denominator("dapo", torch.ones(2), aggregation="seq_mean_token_mean")
    with pytest.raises(ValueError, match="aggregation='mean': an unknown aggregation"):
        loss_denominator("grpo", torch.ones(2), aggregation="mean")


def test_presets_run_and_hold_the_published_numbers():
    arguments = (torch.zeros(3), torch.ones(1), torch.tensor([0, 3], dtype=torch.int32))
    presets = {name: policy_options(name, max_response=8192) for name in PRESETS}
    for name, options in presets.items():
        assert policy_loss(*arguments, options=options)[0].isfinite(), name
    grpo, dapo = presets["grpo"], presets["dapo"]
    assert (grpo.clip, grpo.dual_clip, grpo.aggregation) == ((0.2, 0.2), 3.0, "token_mean")
    assert (dapo.clip, dapo.dual_clip) == ((0.2, 0.28), 10.0)
    assert presets["gspo"].clip == (3e-4, 4e-4)
    assert all(options.kl_coef == 0.0 and options.entropy_coef == 0.0 for options in presets.values())


def test_dr_grpo_divides_by_the_longest_response_and_not_by_the_deviation():
    assert [policy_options("dr_grpo", max_response=n).norm_length for n in (72, 8192)] == [72.0, 8192.0]
    assert all(policy_options(name, max_response=72).norm_length is None for name in PRESETS if name != "dr_grpo")
    assert {name for name in PRESETS if reward_normalization(name) == "mean_only"} == {"dr_grpo"}
    assert {reward_normalization(name) for name in PRESETS if name != "dr_grpo"} == {"per_score"}


def test_options_are_refused_when_they_are_made():
    with pytest.raises(ValueError, match="loss='gspo' has no dual_clip"):
        PolicyLossOptions(loss="gspo", dual_clip=3.0)
    with pytest.raises(ValueError, match="needs norm_length"):
        PolicyLossOptions(loss="dr_grpo")
    with pytest.raises(NotImplementedError, match="loss='gpg' is not offered"):
        PolicyLossOptions(loss="gpg")
    with pytest.raises(ValueError, match="no loss preset 'drgrpo'"):
        policy_options("drgrpo", max_response=72)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy_options("grpo", max_response=72).loss = "gspo"
