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
        "caption": vector("caption_scores"),
        "reasoning": vector("cot_scores"),
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
