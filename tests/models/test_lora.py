"""Adapters and frozen weights: only what shall learn does, and exports are what stock transformers and peft read."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from prism_fast.algorithms.presets import policy_options
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.freezing import freeze, trained_parameters
from prism_fast.models.lora import adapted_layers, add_lora, plain_weights, save_adapter, without_adapters
from prism_fast.models.policy import load_policy, save_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.protocol import Completion
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch
from tests.models.exports import stock_inputs
from tests.support.trainers import update_policy

TRUNK = ["model.language_model.*_proj"]


def with_adapters(policy: nn.Module, dtype: torch.dtype = torch.float32, targets: list[str] = TRUNK) -> nn.Module:
    model = copy.deepcopy(policy).to(dtype)
    add_lora(model, rank=4, alpha=16.0, targets=targets, seed=3)
    return model


@pytest.fixture
def batch(make_prompt, make_rows) -> PolicyBatch:
    prompts = [make_prompt((64, 64)), make_prompt((96, 32))]
    completions = [Completion(tuple(row), (-5.0,) * len(row), 1.0, "stop") for row in make_rows([9, 5, 7, 3])]
    return PolicyBatch(prompts, [0, 0, 1, 1], completions, torch.tensor([1.0, -1.0, 0.5, -0.5]))


def learn(engine: LocalEngine, batch: PolicyBatch, pad_id: int, layout: str = "shared_prefix", tokens: int = 10_000):
    use_layout(layout, engine.module)
    options = policy_options("grpo", max_response=16)
    settings = {"temperature": 1.0, "layout": layout, "pad_id": pad_id}
    return update_policy(engine, batch, options, budget=TokenBudget(tokens, notify=pytest.fail), **settings)


def learned(policy: nn.Module, batch: PolicyBatch, pad_id: int, updates: int = 3) -> nn.Module:
    engine = LocalEngine(with_adapters(policy), OptimizerConfig(lr=0.03))
    for _ in range(updates):
        learn(engine, batch, pad_id)
    return engine.module.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: PolicyBatch) -> Tensor:
    return model(**stock_inputs(batch.prompts[0], model.config)).logits


def test_a_model_begins_as_it_was_and_only_adapters_learn(policy, batch, processor):
    model = with_adapters(policy)
    assert torch.equal(logits(model, batch), logits(policy, batch))
    assert len(adapted_layers(model)) == 2 * 7
    again = with_adapters(policy)  # the seed alone decides
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    engine = LocalEngine(model, OptimizerConfig(lr=0.03, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = learn(engine, batch, processor.pad_id)
    assert metrics["policy/grad_norm"] > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}  # A decays at once, B learns
    assert len(engine.optimizer.state) == len(changed) and len(changed) == 2 * 14


@pytest.mark.parametrize(("layout", "tokens", "checkpointing"), [("padded", 40, False), ("shared_prefix", 40, True)])
def test_adapters_have_the_gradients_of_any_layout(policy, batch, processor, layout, tokens, checkpointing):
    gradients = []
    for settings in (("shared_prefix", 10_000), (layout, tokens)):
        engine = LocalEngine(with_adapters(policy), OptimizerConfig(lr=1e-3))
        for name, p in engine.module.named_parameters():
            if ".lora_B." in name:  # otherwise A has none
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if gradients and checkpointing:
            use_gradient_checkpointing(engine.module)
        gradients.append({})
        engine.optimizer.register_step_pre_hook(
            lambda *_, engine=engine: gradients[-1].update({n: p.grad.clone() for n, p in engine.masters.items()})
        )
        learn(engine, batch, processor.pad_id, *settings)
    whole = torch.stack([g.norm() for g in gradients[0].values()]).norm()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28 and whole > 0
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm() / whole) < 1e-5, name


def test_exports_merged_and_not_give_stock_models_the_same_logits(policy, batch, processor, tmp_path):
    from peft import PeftModel

    save_policy(copy.deepcopy(policy), processor, tmp_path / "base")
    model = learned(policy, batch, processor.pad_id)
    save_policy(model, processor, tmp_path / "merged")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    ours = logits(model, batch)
    scale = float(ours.abs().max())
    assert float((ours - logits(policy, batch)).abs().max()) > 1e-2 * scale  # it has learned something
    stock = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    merged, info = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", **stock, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "base", **stock)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert float((logits(merged.eval(), batch) - ours).abs().max()) < 1e-5 * scale
    assert float((logits(adapted, batch) - ours).abs().max()) < 1e-5 * scale
    assert float((logits(load_policy(tmp_path / "merged"), batch) - ours).abs().max()) < 1e-5 * scale
    theirs = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in plain_weights(model, iter(model.named_parameters())):
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6 * float(weight.detach().abs().max()))
    with pytest.raises(ValueError, match="holds adapters, not a policy"):
        load_policy(tmp_path / "adapter")


def test_an_engine_gives_away_plain_weights(policy, batch, processor, tmp_path):
    engine = LocalEngine(learned(policy, batch, processor.pad_id, updates=1), OptimizerConfig())
    given = dict(engine.named_weights())
    assert {n: w.shape for n, w in given.items()} == {n: w.shape for n, w in policy.named_parameters()}
    differ = {name for name, weight in given.items() if not torch.equal(weight, policy.get_parameter(name))}
    assert differ == {f"{name}.weight" for name in adapted_layers(engine.module)}


def test_without_its_adapters_a_model_is_what_it_was(policy, batch, processor):
    model = learned(policy, batch, processor.pad_id, updates=1)
    after = logits(model, batch)
    with without_adapters(model):
        assert torch.equal(logits(model, batch), logits(policy, batch))
    assert torch.equal(logits(model, batch), after) and not torch.equal(after, logits(policy, batch))
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def test_half_precision_adapters_have_float32_masters_and_resume_to_the_bit(policy, batch, processor, tmp_path):
    def new() -> LocalEngine:
        return LocalEngine(with_adapters(policy, torch.bfloat16), OptimizerConfig(lr=0.01))

    engine, other = new(), new()
    learn(engine, batch, processor.pad_id)
    assert {master.dtype for master in engine.masters.values()} == {torch.float32}
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    engine.save(tmp_path)
    for name, p in other.module.named_parameters():
        if ".lora_" in name:
            nn.init.ones_(p)
    other.load(tmp_path)
    for _ in range(2):
        assert (
            learn(engine, batch, processor.pad_id)["policy/grad_norm"]
            == learn(other, batch, processor.pad_id)["policy/grad_norm"]
        )
    assert all(torch.equal(w, v) for (_, w), (_, v) in zip(engine.named_weights(), other.named_weights(), strict=True))


def test_targets_that_cannot_be_adapted_are_refused(policy, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.lora\.targets: 'q_proj' matches no linear layer.*named like model"):
        with_adapters(policy, targets=["*_proj", "q_proj"])
    with pytest.raises(NotImplementedError, match=r"match lm_head: .*name the layers of the trunk"):
        with_adapters(policy, targets=["*"])
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(with_adapters(policy), rank=2, alpha=1.0, targets=TRUNK, seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"model\.lora needs peft.*prism-fast\[lora\]"):
        with_adapters(policy)


def test_frozen_weights_have_no_moments_and_keep_their_bits(policy, batch, processor, tmp_path):
    model = copy.deepcopy(policy).to(torch.bfloat16)
    found = freeze(model, ["model.visual.*", "*.layers.[1].*norm.weight"])
    assert len(found) == len(list(model.model.visual.parameters())) + 4
    trained, total = trained_parameters(model)
    assert trained == total - sum(model.get_parameter(name).numel() for name in found)
    engine = LocalEngine(model, OptimizerConfig(lr=0.01, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(engine, batch, processor.pad_id)
    assert not set(found) & set(engine.masters)
    same = {name for name, p in engine.named_weights() if torch.equal(p, before[name])}
    assert set(found) <= same
    assert {name for name, p in before.items() if p.ndim == 2} - set(found) <= set(before) - same  # decayed
    save_policy(model, processor, tmp_path / "export")
    again = dict(load_policy(tmp_path / "export", dtype="auto").named_parameters())
    assert all(torch.equal(again[name], before[name]) for name in found)


def test_a_tied_weight_is_frozen_by_either_name_and_a_pattern_must_match(policy):
    model = copy.deepcopy(policy)
    assert freeze(model, ["lm_head.*"]) == ["lm_head.weight"]
    assert not model.model.language_model.embed_tokens.weight.requires_grad
    with pytest.raises(ValueError, match=r"model\.freeze: 'visual\.\*' matches no parameter.*named like model\."):
        freeze(model, ["visual.*"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(model, ["*"])
