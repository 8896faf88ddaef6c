"""The small parts of the trainer: micro-batch cut, learning-rate plateau, seeds, engine."""

from __future__ import annotations

import random

import pytest
import torch

from prism_fast.config import OptimizerConfig, SftConfig
from prism_fast.engine.finite import NonFiniteError
from prism_fast.engine.local import LocalEngine
from prism_fast.models.token_budget import by_tokens
from prism_fast.train.seeds import derive_seed
from prism_fast.train.sft import PlateauDecay


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_micro_batch_within_the_budget(seed):
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 7, rng.randint(1, 200)]) for _ in range(rng.randint(1, 60))]
    budget = rng.randint(1, 400)
    batches = by_tokens(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == [i for i, length in enumerate(lengths) if length]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match="budget"):
        by_tokens([3], 0)


def _run(config: SftConfig, losses: list[float]) -> tuple[int, list[float]]:
    decay, updates, scales = PlateauDecay(config), 0, []
    while updates < decay.end:
        scales.append(decay(updates))
        updates += 1
        if updates % config.eval_every == 0:
            decay.observe(updates, losses[min(updates // config.eval_every, len(losses)) - 1])
    return updates, scales


def test_the_decay_begins_at_the_plateau_and_reaches_zero_at_the_end():
    config = SftConfig(max_updates=1000, eval_every=10, patience=2, min_improvement=0.01, decay_share=0.5)
    updates, scales = _run(config, [1.0, 0.9, 0.8, 0.799, 0.7985, 0.798])  # improves until 30, flat at 40 and 50
    assert updates == 75
    assert scales[:50] == [1.0] * 50
    assert scales[50] == 1.0 and scales[-1] == pytest.approx(1 / 25)
    assert scales == sorted(scales, reverse=True)


def test_a_loss_that_never_flattens_still_decays_by_the_last_update():
    config = SftConfig(max_updates=130, eval_every=10, patience=2, decay_share=0.3)
    updates, scales = _run(config, [2.0 / k for k in range(1, 20)])
    assert updates == 130
    assert scales[99] == 1.0 and scales[-1] < 0.05


@pytest.mark.parametrize(("max_updates", "eval_every"), [(2000, 500), (2000, 50), (2000, 3000), (130, 129), (7, 1)])
def test_the_decay_fits_in_the_updates_wherever_the_loss_is_evaluated(max_updates, eval_every):
    config = SftConfig(max_updates=max_updates, eval_every=eval_every, patience=2, decay_share=0.3)
    updates, scales = _run(config, [2.0**-k for k in range(2001)])
    start = int(max_updates / 1.3)
    assert updates == max_updates and scales[: start + 1] == [1.0] * (start + 1)
    decay = [1 - k / (max_updates - start) for k in range(max_updates - start)]
    assert scales[start:] == pytest.approx(decay)


def test_a_plateau_behind_the_latest_beginning_changes_nothing():
    config = SftConfig(max_updates=130, eval_every=10, patience=2, decay_share=0.3)
    updates, scales = _run(config, [2.0 / k for k in range(1, 10)] + [1.0] * 9)
    assert updates == 130 and scales[-1] == pytest.approx(1 / 30)


def test_seeds_differ_by_purpose_and_repeat():
    seeds = {derive_seed(s, stage, step) for s in (1, 2) for stage in ("align", "rlvr") for step in range(50)}
    assert len(seeds) == 200
    assert derive_seed(1, "align", 3) == derive_seed(1, "align", 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_first_update_of_a_warm_up_has_a_learning_rate():
    engine = LocalEngine(torch.nn.Linear(3, 1), OptimizerConfig(lr=0.1, warmup_steps=4))
    rates = []
    for _ in range(6):
        rates.append(engine.lr())
        engine.backward(engine.module(torch.ones(2, 3)).sum())
        engine.step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_the_gradient_is_clipped_to_its_norm_and_the_norm_before_is_told():
    used = []
    for clip_norm in (0.5, 100.0):
        engine = LocalEngine(torch.nn.Linear(4, 1, bias=False), OptimizerConfig(lr=0.1, clip_norm=clip_norm))
        weight = engine.masters["weight"]
        engine.optimizer.register_step_pre_hook(lambda *_, weight=weight: used.append(float(weight.grad.norm())))
        engine.backward(engine.module(torch.full((1, 4), 3.0)).sum())  # the gradient is (3, 3, 3, 3)
        assert engine.step().grad_norm == pytest.approx(6.0)
    assert used == pytest.approx([0.5, 6.0], rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = torch.nn.Linear(3, 1)
    engine = LocalEngine(model, OptimizerConfig(lr=0.1))
    before = [p.clone() for p in model.parameters()]
    model.weight.register_hook(lambda gradient: gradient * torch.inf)
    engine.backward(model(torch.ones(1, 3)).sum())
    with pytest.raises(NonFiniteError, match="weight"):
        engine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_norms_and_biases_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    engine = LocalEngine(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    sizes = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in engine.optimizer.param_groups}
    assert sizes == {0.5: {2}, 0.0: {1}}
