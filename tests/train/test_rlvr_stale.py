"""Rows that earlier weights sampled: weighed by their importance ratio, against formulas written here."""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.train.policy_trainer import PolicyBatch
from tests.support.trainers import update_policy

LENGTHS = [3, 1, 6, 2, 5]
ROWS = [0, 0, 1, 1, 1]
ADVANTAGE = torch.tensor([0.5, -1.0, 1.5, -0.3, 0.7])


def test_the_ratio_gives_the_gradient_of_the_policy_of_now_and_ratio_one_does_not(generator):
    """All samples enumerated: E_old[r A grad log pi] is the exact gradient of E_now[A]."""
    old = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    theta = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    now = theta.log_softmax(0)
    (exact,) = torch.autograd.grad(-(now.exp() * reward).sum(), theta, retain_graph=True)

    def gradient(old_logp):
        loss, _ = ops.policy_loss(
            now,
            reward,
            torch.arange(6, dtype=torch.int32),  # five responses of one token
            old_logp=old_logp,
            is_weight=old.exp(),  # how often the old policy draws each of them
            loss="dapo",
            clip=(1.0, 1e6),
            denominator=1.0,
        )
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    torch.testing.assert_close(gradient(old), exact, rtol=1e-12, atol=1e-14)
    assert (gradient(None) - exact).norm() > 0.05 * exact.norm()


@pytest.fixture(scope="module")
def setup():
    processor = Processor.build(train_tokenizer(["the sum is 4"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4).double()
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two words")]
    return policy, processor, prompts


def _logprobs(policy, processor, prompts, ids) -> torch.Tensor:
    """[N] by the whole softmax."""
    batch = collate(prompts, ROWS, ids, model_config=policy.config, pad_id=processor.pad_id)
    rows = response_rows(batch)
    logits = policy.lm_head(hidden_states(policy.model, batch).flatten(0, 1)[rows.index])
    return logits.log_softmax(-1).gather(1, rows.target[:, None])[:, 0]


def _update(setup, completions, stale, loss="dapo", budget=10_000):
    policy, processor, prompts = setup
    engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
    engine.discard()
    engine.step = lambda: Update(0.0, 0.0)  # keep the gradients
    numbers = update_policy(
        engine,
        PolicyBatch(prompts, ROWS, completions, ADVANTAGE, stale),
        policy_options(loss, max_response=6),
        temperature=1.0,
        pad_id=processor.pad_id,
        budget=TokenBudget(budget, notify=pytest.fail),
        layout="padded",
    )
    return numbers, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def _completions(setup, generator, drift: float) -> list[Completion]:
    """Responses whose recorded log-probs differ from those of the weights of now by about ``drift``."""
    policy, processor, prompts = setup
    ids = [tuple(torch.randint(0, 200, (n,), generator=generator).tolist()) for n in LENGTHS]
    with torch.no_grad():
        logp = _logprobs(policy, processor, prompts, ids)
    logp = logp + drift * torch.randn(len(logp), generator=generator)
    return [Completion(i, tuple(part.tolist()), 1.0, "stop") for i, part in zip(ids, logp.split(LENGTHS), strict=True)]


def _distance(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    largest = max(g.abs().max() for g in b.values())
    return float(max((a[n] - b[n]).abs().max() for n in a) / largest)


def test_stale_rows_follow_the_clipped_objective_and_fresh_ones_have_ratio_one(setup, generator):
    policy, processor, prompts = setup
    completions = _completions(setup, generator, drift=0.6)
    stale = [True, True, False, True, True]
    numbers, found = _update(setup, completions, stale)
    policy.zero_grad()
    now = _logprobs(policy, processor, prompts, [c.token_ids for c in completions])
    recorded = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float64)
    is_stale = torch.tensor(stale).repeat_interleave(torch.tensor(LENGTHS))
    ratio = (now - torch.where(is_stale, recorded, now.detach())).exp()
    a = ADVANTAGE.double().repeat_interleave(torch.tensor(LENGTHS))
    each = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.28))
    (each.sum() / len(each)).backward()
    wanted = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert _distance(found, wanted) < 1e-6  # the models' float32 islands
    held = ((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))
    assert 0 < held.float().mean() < 1, "the case must clip some tokens and not all"
    assert numbers["policy/clip_fraction"] == pytest.approx(float(held.double().mean()), rel=1e-6)
    assert numbers["policy/ratio_max"] == pytest.approx(float(ratio.detach().max()), rel=1e-4)
    gap = (now.detach() - recorded)[~is_stale].abs()
    assert numbers["rollout/logprob_gap_max"] == pytest.approx(float(gap.max()), rel=1e-3)
    _, as_fresh = _update(setup, completions, None)
    assert _distance(as_fresh, wanted) > 0.01, "taking stale rows as fresh is another gradient"


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_a_stale_row_whose_policy_has_not_moved_is_a_fresh_one(setup, generator, loss):
    completions = _completions(setup, generator, drift=0.0)
    numbers, stale = _update(setup, completions, [True] * 5, loss)
    assert "rollout/logprob_gap_max" not in numbers, "the gap compares engines, not policies of different steps"
    _, fresh = _update(setup, completions, [False] * 5, loss)
    assert _distance(stale, fresh) < 1e-5


@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
def test_the_cut_into_micro_batches_does_not_matter_for_stale_rows(setup, generator, loss):
    completions = _completions(setup, generator, drift=0.01 if loss != "gspo" else 3e-4)
    stale = [True, False, True, True, False]
    whole_numbers, whole = _update(setup, completions, stale, loss)
    numbers, cut = _update(setup, completions, stale, loss, budget=1)
    assert _distance(cut, whole) < 1e-6
    assert numbers["policy/approx_kl"] == pytest.approx(whole_numbers["policy/approx_kl"], rel=1e-3, abs=1e-7)
