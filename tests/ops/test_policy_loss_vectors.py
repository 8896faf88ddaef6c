"""policy_loss and its KL estimators against the reference vectors."""

from __future__ import annotations

import re

import pytest
import torch

from prism_fast.ops import policy_loss
from tests.ops.golden import DTYPES, load, packed

VECTORS = load("policy_loss")
KL = load("kl")
OFFERED = [case for case in VECTORS["cases"] if case["loss_mode"] in ("vanilla", "gspo")]
REFUSED = [case for case in VECTORS["cases"] if case["loss_mode"] not in ("vanilla", "gspo")]
KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "kl+": "k1+", "low_var_kl+": "k3+", "mse+": "k2"}


def published(case: dict, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    """(loss, gradient [B, T], wanted gradient, stats) of a published case, packed or padded with a mask."""
    dtype = DTYPES[case["dtype"]]
    values = {
        name: torch.tensor(case[name], dtype=dtype).flatten()
        for name in ("old_log_prob", "log_prob", "advantages", "rollout_is_weights")
        if case[name] is not None
    }
    rows, width = len(case["log_prob"]), len(case["log_prob"][0])
    index, cu_seqlens = packed(case["response_mask"])
    mask = None
    if layout == "padded":
        index, cu_seqlens = torch.arange(rows * width), torch.arange(0, rows * width + 1, width, dtype=torch.int32)
        mask = torch.tensor(case["response_mask"], dtype=dtype).flatten()
    logp = values["log_prob"].clone().requires_grad_()
    config, aggregation = case["config"], case["loss_agg_mode"].replace("-", "_")
    options = {"clip": (config["clip_ratio_low"], config["clip_ratio_high"])}
    if case["loss_mode"] == "vanilla":
        options |= {"loss": "grpo", "dual_clip": config["clip_ratio_c"], "aggregation": aggregation}
        if aggregation == "seq_mean_token_sum_norm":  # the published form divides by the padded width alone
            options |= {"norm_length": width, "denominator": 1.0}
    else:
        options |= {"loss": "gspo"}
    weights = values.get("rollout_is_weights")
    per_sequence = torch.tensor(case["advantages"], dtype=dtype).flatten()[torch.arange(rows) * width]
    loss, stats = policy_loss(
        logp[index],
        per_sequence,
        cu_seqlens,
        old_logp=values["old_log_prob"][index],
        is_weight=None if weights is None else weights[index],
        mask=mask,
        **options,
    )
    loss.backward()
    return loss.detach(), logp.grad, torch.tensor(case["grad_log_prob"], dtype=dtype).flatten(), stats


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("case", OFFERED, ids=lambda case: case["name"])
def test_policy_loss_vectors(case, layout):
    loss, gradient, wanted, stats = published(case, layout)
    tolerance = 1e-8 if loss.dtype == torch.float64 else 2e-5
    reference = torch.tensor(case["loss"], dtype=loss.dtype)
    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    metrics = case["metrics"]
    found = {
        "actor/pg_clipfrac": stats.clip_fraction_low + stats.clip_fraction_high,
        "actor/pg_clipfrac_lower": stats.dual_clip_fraction,
        "actor/ppo_kl": stats.approx_kl,
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_published_losses_left_out_say_what_to_use(case):
    logp = torch.zeros(3)
    with pytest.raises(NotImplementedError, match=f"{case['loss_mode']}.*use"):
        policy_loss(logp, torch.zeros(1), torch.tensor([0, 3], dtype=torch.int32), loss=case["loss_mode"])


def test_published_gspo_ignores_the_aggregation_and_ours_refuses_a_contradiction():
    with pytest.raises(ValueError, match="gspo.*token_mean.*seq_mean_token_mean"):
        policy_loss(
            torch.zeros(3),
            torch.zeros(1),
            torch.tensor([0, 3], dtype=torch.int32),
            loss="gspo",
            aggregation="token_mean",
        )


@pytest.mark.parametrize("case", VECTORS["agg_loss_cases"], ids=lambda case: case["loss_agg_mode"])
def test_aggregation_vectors(case):
    values, mask = torch.tensor(case["loss_mat"], dtype=torch.float64), torch.tensor(case["loss_mask"])
    rows, width = values.shape
    aggregation = case["loss_agg_mode"].replace("-", "_")
    norm = {"norm_length": width, "denominator": 1.0} if aggregation == "seq_mean_token_sum_norm" else {}
    loss, _ = policy_loss(
        torch.zeros(rows * width, dtype=torch.float64),
        None,
        torch.arange(0, rows * width + 1, width, dtype=torch.int32),
        token_advantage=-values.flatten(),  # on-policy, a token's loss is minus its advantage
        mask=mask.flatten(),
        aggregation=aggregation,
        **norm,
    )
    assert loss.item() == pytest.approx(case["loss"], rel=2e-8, abs=1e-12)


@pytest.mark.parametrize("case", KL["cases"], ids=lambda case: f"{case['kl_penalty']}/{case['dtype']}")
def test_kl_vectors(case):
    dtype = DTYPES[case["dtype"]]
    logp = torch.tensor(KL["log_prob"], dtype=dtype).flatten().requires_grad_()
    ref_logp = torch.tensor(KL["ref_log_prob"], dtype=dtype).flatten()
    n = logp.shape[0]

    def divergence(kl: str) -> torch.Tensor:  # one sequence per token: the aggregate under weight n is the plain sum
        return policy_loss(
            logp,
            torch.zeros(n, dtype=dtype),
            torch.arange(n + 1, dtype=torch.int32),
            ref_logp=ref_logp,
            kl=kl,
            kl_coef=1.0,
            aggregation="token_mean",
            denominator=1.0,
        )[0]

    kind = case["kl_penalty"]
    if "raises" in case and not kind.endswith("+"):
        with pytest.raises(NotImplementedError, match="use 'k"):
            divergence(kind)
        return
    if kind in KL_NAMES:
        with pytest.raises(ValueError, match=re.escape(f"called {KL_NAMES[kind]!r}")):
            divergence(kind)
    total = divergence(KL_NAMES.get(kind, kind))
    if "raises" in case:  # straight through: what it was meant to give stands in no vector, see the test below
        return
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    wanted = torch.tensor(case["value"], dtype=dtype).flatten()
    torch.testing.assert_close(total, wanted.sum(), rtol=tolerance, atol=n * tolerance)
    total.backward()
    gradient = torch.tensor(case["grad_of_sum"], dtype=dtype).flatten()
    torch.testing.assert_close(logp.grad, gradient, rtol=tolerance, atol=tolerance)
    from prism_fast.ops.reference.kl import kl_estimate

    each = kl_estimate(logp.detach(), ref_logp, KL_NAMES.get(kind, kind))
    torch.testing.assert_close(each, wanted, rtol=tolerance, atol=tolerance)
