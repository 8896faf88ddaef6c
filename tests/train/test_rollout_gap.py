"""Importance weights between rollout engine and trainer, and the alarm, against formulas written here in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from prism_fast import ops
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import ConfigError, OptimizerConfig, RolloutConfig, load_config
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.track.metrics import Metrics
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.rollout_gap import RolloutGap, RolloutGapError
from tests.support.trainers import update_policy

LENGTHS = [3, 1, 6, 2, 5]
ROWS = [0, 0, 1, 1, 1]
ADVANTAGE = torch.tensor([0.5, -1.0, 1.5, -0.3, 0.7])
OPEN = {"gap_warn": 100.0, "gap_stop": 100.0}
TEMPERATURE = 1.3


@pytest.fixture(scope="module")
def setup():
    """A policy in float64, two prompts, and responses whose recorded log-probs differ from the policy's by 0.5."""
    processor = Processor.build(train_tokenizer(["the sum is 4"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4).double()
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two words")]
    generator = torch.Generator().manual_seed(7)
    ids = [tuple(torch.randint(0, 200, (n,), generator=generator).tolist()) for n in LENGTHS]
    with torch.no_grad():
        own = logprobs(policy, processor, prompts, ids)
    recorded = own + 0.5 * torch.randn(len(own), generator=generator, dtype=torch.float64)
    completions = [
        Completion(i, tuple(part.tolist()), 1.0, "stop") for i, part in zip(ids, recorded.split(LENGTHS), strict=True)
    ]
    return policy, processor, prompts, completions


def logprobs(policy, processor, prompts, ids) -> torch.Tensor:
    """[N] by the whole softmax."""
    batch = collate(prompts, ROWS, ids, model_config=policy.config, pad_id=processor.pad_id)
    rows = response_rows(batch)
    logits = policy.lm_head(hidden_states(policy.model, batch).flatten(0, 1)[rows.index])
    logits[:, list(processor.banned_ids)] = -torch.inf
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]


def update(setup, gap, *, budget=10_000, off_policy=None):
    policy, processor, prompts, completions = setup
    policy = copy.deepcopy(policy)
    engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
    engine.where = "align step 7"
    engine.step = lambda: Update(0.0, 0.0)  # keep the gradients
    metrics = update_policy(
        engine,
        PolicyBatch(prompts, ROWS, completions, ADVANTAGE, off_policy),
        policy_options("dapo", max_response=6),
        temperature=TEMPERATURE,
        banned=processor.banned_ids,
        pad_id=processor.pad_id,
        budget=TokenBudget(budget, notify=pytest.fail),
        layout="padded",
        gap=gap,
    )
    return metrics, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def gap_of(tell=pytest.fail, dtype=torch.float32, **settings) -> RolloutGap:
    return RolloutGap(RolloutConfig(**settings), dtype, tell=tell)


def by_hand(kind: str, ratio: torch.Tensor, threshold: float) -> torch.Tensor:
    """The weight of every token."""
    if kind == "truncated":
        return ratio.clamp(max=threshold)
    if kind == "masked":
        return ratio * ((ratio >= 1 / threshold) & (ratio <= threshold))
    whole = torch.stack([part.prod() for part in ratio.split(LENGTHS)])
    whole = whole * ((whole >= 1 / threshold) & (whole <= threshold))
    return whole.repeat_interleave(torch.tensor(LENGTHS))


@pytest.mark.parametrize("budget", [10_000, 1], ids=["together", "one by one"])
@pytest.mark.parametrize("kind", ["truncated", "masked", "sequence_masked"])
def test_weights_of_the_loss_and_their_metrics(kind, budget, setup):
    policy, processor, prompts, completions = setup
    threshold = 1.6
    fresh = [False, False, True, False, False]  # one response is off-policy: its ratio is in the loss already
    metrics, found = update(
        setup, gap_of(importance=kind, importance_threshold=threshold, **OPEN), budget=budget, off_policy=fresh
    )
    policy.zero_grad()
    own = logprobs(policy, processor, prompts, [c.token_ids for c in completions])
    recorded = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float64)
    of_token = torch.repeat_interleave(torch.tensor(LENGTHS))
    ratio, old = (own - recorded).exp(), torch.tensor(fresh)[of_token]
    weight = by_hand(kind, ratio.detach(), threshold)
    advantage = ADVANTAGE.double()[of_token]
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 0.2, 1 + 0.28))
    clipped = torch.where(advantage < 0, torch.minimum(clipped, -advantage * 10.0), clipped)
    loss = torch.where(old, clipped, -advantage * weight * (own - own.detach()).exp()).sum() / sum(LENGTHS)
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    largest = max(p.grad.abs().max() for p in policy.parameters() if p.grad is not None)
    for name, gradient in found.items():
        error = (gradient - policy.get_parameter(name).grad).abs().max() / largest
        assert error < 2e-6, name
    policy.zero_grad()

    each = torch.tensor([w[0] for w in weight.split(LENGTHS)]) if kind == "sequence_masked" else weight
    moved = torch.tensor(
        [not 1 / threshold <= r.prod() <= threshold for r in ratio.split(LENGTHS)]
        if kind == "sequence_masked"
        else [r > threshold or (kind == "masked" and r < 1 / threshold) for r in ratio.tolist()]
    )
    counted = ~torch.tensor(fresh) if kind == "sequence_masked" else ~old
    each, moved = each[counted], moved[counted]
    share = "truncated_share" if kind == "truncated" else "masked_share"
    assert 0 < moved.double().mean() < 1, "the case shows nothing"
    assert metrics[f"importance/{share}"] == pytest.approx(moved.double().mean().item())
    assert metrics["importance/weight_mean"] == pytest.approx(each.mean().item(), rel=1e-5)
    effective = each.sum() ** 2 / (each**2).sum() / len(each)
    assert metrics["importance/effective_share"] == pytest.approx(effective.item(), rel=1e-5)


def test_off_is_code_not_entered(setup, monkeypatch):
    def entered(*arguments, **options):
        raise AssertionError("importance weights were computed")

    plain, gradient = update(setup, None)
    monkeypatch.setattr(ops, "importance_weights", entered)
    metrics, found = update(setup, gap_of(**OPEN))
    assert metrics == plain
    assert all(torch.equal(found[name], gradient[name]) for name in gradient)
    with pytest.raises(AssertionError, match="were computed"):
        update(setup, gap_of(importance="truncated", **OPEN))


def test_only_off_policy_responses_have_no_weight_and_no_alarm(setup):
    metrics, _ = update(setup, gap_of(importance="masked", gap_stop=1e-9), off_policy=[True] * 5)
    assert not [name for name in metrics if name.startswith("importance/")]


def test_a_gap_above_the_limit_ends_the_update_and_drops_its_gradient(setup):
    with pytest.raises(RolloutGapError, match=r"align step 7: .* by 0\.\d+ nats .*rollout\.gap_stop=0\.02.*push"):
        update(setup, gap_of())
    engine = LocalEngine(copy.deepcopy(setup[0]), OptimizerConfig(lr=1e-3))
    with pytest.raises(RolloutGapError):
        gap_of(gap_stop=0.3).check(engine, gap_metrics(0.31))
    gap_of(tell=lambda text: None, gap_stop=0.3).check(engine, gap_metrics(0.29))
    with pytest.raises(RolloutGapError):
        gap_of().check(engine, gap_metrics(float("nan")))
    RolloutGap(RolloutConfig(), torch.float32, tell=pytest.fail, alarm=False).check(engine, gap_metrics(9.0))


def gap_metrics(gap: float):
    metrics = Metrics()
    metrics.mean("rollout/logprob_gap_mean", 3 * gap, 3)
    return metrics


@pytest.mark.parametrize(("dtype", "warns"), [(torch.float32, [2e-4, 4.1e-4]), (torch.bfloat16, [0.06, 0.13])])
def test_a_growing_gap_is_told_as_it_doubles(dtype, warns, setup):
    told = []
    gap = gap_of(tell=told.append, dtype=dtype)
    engine = LocalEngine(copy.deepcopy(setup[0]), OptimizerConfig(lr=1e-3))
    small, between = warns[0] / 3, 1.9 * warns[0]
    for value in (small, warns[0], warns[0], between, warns[1], small):
        gap.check(engine, gap_metrics(value))
    assert len(told) == 2 and all("rollout.gap_warn" in text for text in told)
    assert f"{warns[0]:.3g} nats" in told[0] and f"{warns[1]:.3g} nats" in told[1]


@pytest.mark.parametrize("override", ["rollout.importance=tis", "rollout.importance_threshold=0.5"])
def test_settings_that_make_no_sense_are_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config("digits", [override])
