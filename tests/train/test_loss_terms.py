"""KL to the stage's start and the entropy bonus, against their formulas in float64."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import ConfigError, load_config
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.lora import ADAPTER, adapted_layers, add_lora
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.plan import make_plan
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer
from prism_fast.train.reference import Reference
from tests.support.float64 import Float64Islands
from tests.support.small_policy import SMALL
from tests.train.conftest import run_small

TEMPERATURE, BANNED = 1.3, (3, 5)


@pytest.fixture(scope="module")
def policy(processor) -> nn.Module:
    return build_tiny_policy(processor, SMALL, seed=2).double()


@pytest.fixture(scope="module")
def batch(processor) -> PolicyBatch:
    """Two prompts, one with an image; five responses, one without an advantage, two that earlier weights sampled."""
    rng = np.random.default_rng(4)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    asked = [([{"type": "image"}, {"type": "text", "text": "sum?"}], [image]), ([{"type": "text", "text": "2?"}], [])]
    prompts = [processor.encode_prompt([{"role": "user", "content": c}], images) for c, images in asked]
    ids = [tuple(rng.integers(10, 200, n).tolist()) for n in (7, 4, 6, 5, 3)]
    completions = [Completion(row, tuple((-5 + rng.normal(size=len(row))).tolist()), 1.0, "stop") for row in ids]
    advantage = torch.tensor([1.0, -0.7, 0.0, 0.4, -1.1])
    return PolicyBatch(prompts, [0, 0, 0, 1, 1], completions, advantage, [False, False, False, True, True])


def moved(model: nn.Module, names: str) -> nn.Module:
    """The model after some learning: parameters whose names hold ``names`` have moved, in place."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names in name:
                p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def logprobs(model: nn.Module, batch: PolicyBatch, pad_id: int) -> Tensor:
    """All log-probs [B][n_b, V] of responses, one after the other, by hand."""
    found = []
    for b, completion in enumerate(batch.completions):
        row = collate(
            [batch.prompts[batch.prompt_of[b]]], [0], [completion.token_ids], model_config=model.config, pad_id=pad_id
        )
        hidden = hidden_states(model.model, row).flatten(0, 1)[response_rows(row).index]
        scores = hidden @ model.lm_head.weight.T
        scores = scores.index_fill(1, torch.tensor(BANNED), -torch.inf) / TEMPERATURE
        found.append(scores.log_softmax(-1))
    return found


def by_hand(model, reference, batch, pad_id, *, kl: str, kl_coef: float, entropy_coef: float) -> Tensor:
    """Token mean of -A r + c_kl KL - c_h H, r clipped in [0.8, 1.2] for off-policy rows."""
    with torch.no_grad():
        references = logprobs(reference, batch, pad_id)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for b, logs in enumerate(logprobs(model, batch, pad_id)):
        ids = torch.tensor(batch.completions[b].token_ids)[:, None]
        own, ref = logs.gather(1, ids)[:, 0], references[b].gather(1, ids)[:, 0]
        old = torch.tensor(batch.completions[b].logprobs, dtype=torch.float64) if batch.off_policy[b] else own.detach()
        ratio, advantage = (own - old).exp(), float(batch.advantage[b])
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        if advantage < 0:
            policy = torch.minimum(policy, torch.tensor(-3.0 * advantage, dtype=torch.float64))
        d = own - ref
        penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[kl]
        finite = logs.masked_fill(logs.isinf(), 0.0)
        entropy = -(logs.exp() * finite).sum(-1)
        total = total + (policy + kl_coef * penalty - entropy_coef * entropy).sum()
        tokens += len(ids)
    return total / tokens


@pytest.mark.parametrize(
    ("kl", "kl_coef", "entropy_coef", "lora", "layout", "budget"),
    [
        ("k3", 0.3, 0.0, False, "shared_prefix", 10_000),
        ("k1", 0.3, 0.05, False, "shared_prefix", 30),
        ("k2", 0.2, 0.0, True, "shared_prefix", 10_000),
        ("abs", 0.2, 0.0, False, "padded", 40),
        ("k3", 0.1, 0.02, True, "padded", 40),
        ("k3", 0.0, 0.1, False, "shared_prefix", 10_000),
    ],
)
def test_loss_and_gradient_are_those_of_the_formula(
    policy, batch, processor, kl, kl_coef, entropy_coef, lora, layout, budget
):
    model, start = copy.deepcopy(policy), copy.deepcopy(policy)
    if lora:
        add_lora(model, rank=3, alpha=6.0, targets=["model.language_model.*_proj"], seed=1)
    use_layout(layout, model)
    reference = Reference(model) if kl_coef else None
    moved(model, "lora_" if lora else "proj")
    terms = {"kl": kl, "kl_coef": kl_coef, "entropy_coef": entropy_coef}
    engine = LocalEngine(model, OptimizerConfig())
    engine.packing_checked = True
    trainer = PolicyTrainer(
        engine,
        Batching(layout, TokenBudget(budget, notify=pytest.fail), processor.pad_id),
        policy_options("grpo", max_response=8, **terms),
        temperature=TEMPERATURE,
        banned=BANNED,
        reference=reference,
    )
    with Float64Islands():
        metrics = trainer.accumulate(batch).read()
        found = {name: master.grad for name, master in engine.masters.items() if master.grad is not None}
        expected = by_hand(model, start, batch, processor.pad_id, **terms)
        names = list(found)
        gradients = torch.autograd.grad(expected, [engine.masters[name] for name in names])
    assert metrics["policy/loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert metrics["policy/rows"] == 5  # also the one without an advantage
    assert len(names) == (28 if lora else len(engine.masters))
    whole = torch.stack([g.norm() for g in gradients]).norm()
    for name, gradient in zip(names, gradients, strict=True):
        assert float((found[name] - gradient).norm() / whole) < 1e-6, name
    assert ("policy/kl" in metrics) == bool(kl_coef) and ("policy/entropy_bonus" in metrics) == bool(entropy_coef)
    if kl in ("k2", "k3", "abs") and kl_coef:
        assert metrics["policy/kl"] > 1e-4


def test_a_policy_that_has_not_moved_has_no_kl(policy, batch, processor):
    model = copy.deepcopy(policy).float()
    use_layout("shared_prefix", model)
    reference = Reference(model)
    engine = LocalEngine(model, OptimizerConfig(lr=0.01))
    batching = Batching("shared_prefix", TokenBudget(10_000, notify=pytest.fail), processor.pad_id)
    options = policy_options("grpo", max_response=8, kl_coef=0.1)
    trainer = PolicyTrainer(engine, batching, options, temperature=1.0, banned=BANNED, reference=reference)
    kl = []
    for _ in range(2):
        metrics = trainer.accumulate(batch) | trainer.step()
        kl.append(metrics.read()["policy/kl"])
    assert kl[0] == 0.0 < kl[1]
    with pytest.raises(ValueError, match="a reference policy goes with a KL term"):
        PolicyTrainer(engine, batching, options, temperature=1.0)
    with pytest.raises(ValueError, match="a reference policy goes with a KL term"):
        PolicyTrainer(engine, batching, policy_options("grpo", max_response=8), temperature=1.0, reference=reference)


def test_adapters_are_switched_off_and_on_again(policy):
    model = copy.deepcopy(policy)
    add_lora(model, rank=2, alpha=4.0, targets=["*q_proj"], seed=1)
    reference = Reference(model)
    assert not reference.copied and reference.module is model
    assert all(not layer.disable_adapters and ADAPTER in layer.lora_A for layer in adapted_layers(model).values())


def test_stages_penalise_their_distance_from_their_start(small_run, finished, tmp_path):
    settings = ["stages=[rlvr]", "eval.limit=1", f"model.policy={finished / 'export' / 'sft'}", "rlvr.steps=3"]
    terms = ["rlvr.loss_terms.kl_coef=0.1", "rlvr.loss_terms.entropy_coef=0.01", "rlvr.optimizer.lr=0.002"]
    run = run_small(tmp_path / "run", [*small_run, *settings, *terms])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["stage"] == "rlvr"]
    assert steps[0]["policy/kl"] == 0.0 and steps[1]["policy/kl"] > 0 and steps[2]["policy/kl"] > 0
    assert all(record["policy/entropy_bonus"] > 0 for record in steps)
    assert "KL 0.1 k3, entropy 0.01" in json.loads((run / "environment.json").read_text())["rlvr.loss"]
    plan = make_plan(load_config(str(run / "config.yaml")))
    held = {part.name: part.bytes for phase in plan.stages[0].phases for part in phase.components}
    assert held["reference weights"] == held["policy weights"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["align.loss_terms.clip=[0.1,0.2]"], "align.loss_terms.clip must be left out: every step"),
        (["rlvr.loss_terms.clip=[0.1,0.2]"], "rlvr.loss_terms.clip must be left out where every ratio is 1"),
        (["rlvr.loss_terms.kl_coef=0.1", "semantics=released"], "rlvr.loss_terms must be left out with semantics=rel"),
        (["align.loss_terms.kl=k2", "semantics=paper"], "align.loss_terms must be left out with semantics=paper"),
        (["align.loss_terms.kl=k4"], "k4"),
        (["rlvr.loss_terms.kl_coef=-1"], "rlvr.loss_terms.kl_coef must be 0 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config("digits", overrides)


def test_clip_ranges_replace_those_of_the_preset():
    config = load_config("digits", ["rlvr.updates_per_step=2", "rlvr.loss_terms.clip=[0.1,0.3]"])
    options = policy_options("grpo", max_response=8, **config.rlvr.loss_terms.options())
    assert (options.clips, options.dual_clip) == ((0.1, 0.3), 3.0)
    with pytest.raises(ValueError, match="clip"):
        policy_options("sapo", max_response=8, clip=(0.1, 0.3))
