"""Alignment and outcome advantages against the reference vectors, and the rules they must obey."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.advantages import MODES, alignment_advantage, outcome_advantage
from tests.ops.golden import DTYPES, group_ids, load

ADVANTAGES = load("advantages")["cases"]
# The published vectorised form fails on the ids that its own trainer passes; those cases hold an error, not numbers.
GRPO = [case for case in load("grpo")["cases"] if isinstance(case["advantages"], list)]
FLAGS = (  # the published precedence of the switches
    ("use_sign_align", "sign_align"),
    ("use_rlvr_v2", "rlvr_v2"),
    ("use_rlvr", "rlvr"),
    ("use_gated_align", "gated_align"),
    ("use_acc_gating", "acc_gating"),
)


def published_arguments(case: dict) -> dict:
    """Our arguments for a published call. Missing rewards: nobody is invalid, nobody is known to be wrong."""
    dtype = DTYPES[case["dtype"]]
    options = case["kwargs"]
    rows = len(case["index"])

    def vector(name: str) -> torch.Tensor | None:
        return None if case[name] is None else torch.tensor(case[name], dtype=dtype)

    accuracy, form = vector("acc_scores"), vector("format_scores")
    return {
        "scores": torch.stack((vector("caption_scores"), vector("cot_scores")), 1),
        "group": group_ids(case["index"]),
        "valid": torch.ones(rows, dtype=torch.bool) if form is None else form > 0,
        "accuracy": torch.ones(rows, dtype=dtype) if accuracy is None else accuracy,
        "format": form,
        "mode": next((mode for flag, mode in FLAGS if options.get(flag)), "default"),
        "weights": (options.get("caption_weight", 0.5), options.get("cot_weight", 0.5)),
        "align_coef": options.get("align_coef", 1.0),
        "wrong_penalty": options.get("wrong_penalty", 1.0),
        "format_penalty": options.get("format_penalty", 0.0),
        "accuracy_weight": options.get("w_acc", 1.0),
        "format_weight": options.get("w_fmt", 1.0),
        "singleton": "identity",
    }


@pytest.mark.parametrize("case", ADVANTAGES, ids=lambda case: case["name"])
def test_alignment_vectors(case):
    arguments = published_arguments(case)
    found = alignment_advantage(**arguments, backend="reference")
    dtype = DTYPES[case["dtype"]]
    assert found.dtype == dtype
    wanted = torch.tensor(case["advantages"], dtype=dtype)
    mask = torch.tensor(case["response_mask"], dtype=dtype)
    tolerance = 5e-7 if dtype == torch.float64 else 5e-3 if "tiny_scale" in case["name"] else 2e-5
    torch.testing.assert_close(found[:, None] * mask, wanted, rtol=0, atol=tolerance)


def test_vectors_cover_every_mode():
    assert {published_arguments(case)["mode"] for case in ADVANTAGES} == set(MODES)


@pytest.mark.parametrize("case", GRPO, ids=lambda case: case["name"])
def test_outcome_vectors(case):
    dtype = DTYPES[case["dtype"]]
    found = outcome_advantage(
        torch.tensor(case["token_level_rewards"], dtype=dtype).sum(1),
        group_ids(case["index"]),
        normalize="per_score" if case["norm_adv_by_std"] else "mean_only",
        eps=case["epsilon"],
        singleton="identity",
        backend="reference",
    )
    wanted = torch.tensor(case["advantages"], dtype=dtype)
    mask = torch.tensor(case["response_mask"], dtype=dtype)
    tolerance = 5e-7 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[:, None] * mask, wanted, rtol=0, atol=tolerance)


def batch(generator, rows=24):
    return {
        "scores": torch.randn(rows, 2, generator=generator, dtype=torch.float64),
        "group": torch.arange(rows) % 4,
        "valid": torch.rand(rows, generator=generator) > 0.3,
        "accuracy": (torch.rand(rows, generator=generator) > 0.5).double(),
    }


def test_default_mode_needs_no_accuracy_and_the_others_say_so(generator):
    data = batch(generator)
    del data["accuracy"]
    assert alignment_advantage(**data).isfinite().all()
    for mode in MODES[1:]:
        with pytest.raises(ValueError, match=f"mode='{mode}' needs accuracy"):
            alignment_advantage(**data, mode=mode)
    with pytest.raises(ValueError, match="mode='sign' is not one of 'default'"):
        alignment_advantage(**data, mode="sign")


@pytest.mark.parametrize("mode", MODES)
def test_constant_shift_of_the_scores_changes_nothing(mode, generator):
    data = batch(generator)
    base = alignment_advantage(**data, mode=mode)
    shifted = alignment_advantage(**(data | {"scores": data["scores"] + torch.tensor([3.0, -7.0])}), mode=mode)
    torch.testing.assert_close(base, shifted, rtol=1e-9, atol=1e-9)


def test_default_mode_by_hand():
    scores = torch.tensor([[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]])
    valid = torch.tensor([True, True, False])  # the third scores become 0 and 1, one below the group's minimum
    found = alignment_advantage(scores, torch.zeros(3, dtype=torch.int64), valid=valid, weights=(1.0, 10.0))
    wanted = [
        (1.0 - 4 / 3) / (7 / 3) ** 0.5 + 10 * (4.0 - 7 / 3) / (7 / 3) ** 0.5,
        (3.0 - 4 / 3) / (7 / 3) ** 0.5 + 10 * (2.0 - 7 / 3) / (7 / 3) ** 0.5,
        (0.0 - 4 / 3) / (7 / 3) ** 0.5 + 10 * (1.0 - 7 / 3) / (7 / 3) ** 0.5 - 1.5,
    ]
    assert found.tolist() == pytest.approx(wanted, abs=2e-5)


def test_group_without_a_valid_response_gets_the_penalty_alone():
    zeros = torch.zeros(4)
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None].expand(4, 2)
    found = alignment_advantage(scores, zeros.long(), valid=zeros.bool())
    assert found.tolist() == [-1.5] * 4


def test_equal_rewards_teach_nothing():
    reward = torch.tensor([0.9] * 7 + [0.2, 0.9])
    group = torch.tensor([0] * 7 + [1, 1])
    for normalize in ("per_score", "mean_only", "leave_one_out"):
        found = outcome_advantage(reward, group, normalize=normalize)
        assert torch.equal(found[:7], torch.zeros(7)) and found[8] > 0 > found[7]


def test_a_response_without_a_reward_gets_none_and_moves_no_other():
    reward, group = torch.tensor([1.0, 0.0, 0.5, 77.0, 3.0, 9.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    scored = torch.tensor([True, True, True, False, False, False])
    for normalize in ("per_score", "mean_only"):
        found = outcome_advantage(reward, group, scored=scored, normalize=normalize)
        alone = outcome_advantage(reward[:3], group[:3], normalize=normalize)
        assert torch.equal(found[:3], alone) and found[3:].tolist() == [0.0] * 3
        assert torch.equal(
            outcome_advantage(reward, group, scored=torch.ones(6, dtype=torch.bool), normalize=normalize),
            outcome_advantage(reward, group, normalize=normalize),
        )


def test_response_without_a_rival_has_no_advantage():
    one = torch.ones(1)
    assert outcome_advantage(one, torch.zeros(1, dtype=torch.int64)).item() == 0.0
    found = alignment_advantage(
        one.expand(1, 2), torch.zeros(1, dtype=torch.int64), valid=torch.ones(1, dtype=torch.bool)
    )
    assert found.item() == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_scores_are_computed_in_float32(mode, generator):
    data = {k: v if v.dtype in (torch.bool, torch.int64) else v.bfloat16() for k, v in batch(generator).items()}
    lifted = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in data.items()}
    found = alignment_advantage(**data, mode=mode, weights=(0.3, 0.7), format_weight=0.2)
    assert torch.equal(found, alignment_advantage(**lifted, mode=mode, weights=(0.3, 0.7), format_weight=0.2))
