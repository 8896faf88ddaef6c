"""The mixin against TRL's own trainer: the same loss and gradient from the same inputs, and the same training."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (`make install` brings it)")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from prism_fast.integrations.trl import FusedLoss
from tests.integrations import tiny

ROOT = Path(__file__).resolve().parents[2]
B, P, T = 4, 3, 7
LOSSES = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "grpo with TRL's KL": {"loss_type": "grpo", "beta": 0.04},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.07},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2, "beta": 0.2
    },
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.5, "beta": 0.1, "entropy_coef": 0.02},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.3},
    "bnpo": {"loss_type": "bnpo", "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 0.3},
    # Temperatures that float32 holds exactly: TRL puts them into a float32 tensor.
    "sapo": {"loss_type": "sapo", "beta": 0.1, "use_bias_correction_kl": False, "sapo_temperature_neg": 1.25},
}  # fmt: skip


class Trainer(FusedLoss, GRPOTrainer):
    pass


def reward(completions, **_):
    """Depends on the text alone; some groups get equal rewards."""
    return [float(len(text) % 5) for text in completions]


def trainer(kind: type, folder: Path, network=None, **settings) -> GRPOTrainer:
    fixed = dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=1)
    sizes = dict(per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=2)
    settings = fixed | sizes | dict(max_completion_length=T, learning_rate=1e-3, temperature=0.9) | settings
    prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{2 * i}" for i in range(12)]})
    return kind(
        model=tiny.model() if network is None else network,
        reward_funcs=reward,
        args=GRPOConfig(str(folder), **settings),
        train_dataset=prompts,
        processing_class=tiny.tokenizer(),
    )


def batch(generator, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL's rollout leaves it: left-padded prompts, right-padded completions, one of them empty."""
    lengths, prompts = torch.tensor([T, 3, 5, 0]), torch.tensor([P, 1, 2, P])
    return {
        "prompt_ids": torch.randint(3, 60, (B, P), generator=generator),
        "prompt_mask": (torch.arange(P) >= P - prompts[:, None]).long(),
        "completion_ids": torch.randint(3, 60, (B, T), generator=generator),
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.randn(B, generator=generator).to(dtype),
        "num_items_in_batch": torch.tensor(31.0),
        "ref_per_token_logps": -3.0 + torch.randn(B, T, generator=generator).to(dtype) * 0.3,
    }


def drifted(logp: torch.Tensor, generator) -> torch.Tensor:
    """Log-probabilities of a policy a few steps ago: ratios on both sides of every bound."""
    return logp.detach() + 0.5 * torch.randn(logp.shape, generator=generator).to(logp.dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_its_gradient_in_float64(name, training, tmp_path, generator, monkeypatch):
    """Both losses read the same log-probabilities, so nothing but the formula can differ."""
    settings = dict(LOSSES[name])
    beta = settings.pop("beta", 0.0)  # set afterwards: at construction TRL would load a reference model
    ours = trainer(Trainer, tmp_path, steps_per_generation=4, **settings)
    ours.beta = beta
    ours.model.train(training)
    ours.current_gradient_accumulation_steps = 2
    inputs = batch(generator, torch.float64)
    start = -3.0 + torch.randn(B, T, generator=generator).double() * 0.3
    inputs["old_per_token_logps"] = drifted(start, generator)
    found = {}
    for kind in (Trainer, GRPOTrainer):
        logp = start.clone().requires_grad_()
        answer = (logp, -logp * logp.exp(), None)  # an entropy with a gradient
        ours.entropy_coef = ours.args.entropy_coef
        ours._last_world_entropy, ours._entropy_window_stats = 0.2, None
        monkeypatch.setattr(ours, "_get_per_token_logps_and_entropies", lambda *_, answer=answer, **__: answer)
        loss = kind._compute_loss(ours, ours.model, dict(inputs))
        found[kind] = loss.detach(), *torch.autograd.grad(loss, logp)
        found[kind] += (
            {name: values.pop() for name, values in ours._metrics["train" if training else "eval"].items()},
        )
    (loss, gradient, metrics), (wanted, slope, theirs) = found[Trainer], found[GRPOTrainer]
    assert loss.dtype == torch.float64 and slope.any()
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-16)
    assert gradient[inputs["completion_mask"] == 0].eq(0).all()
    assert set(metrics) == set(theirs)
    for key, value in metrics.items():
        assert value == pytest.approx(theirs[key], rel=1e-6), key
    if name not in ("sapo", "cispo"):
        assert metrics["clip_ratio/region_mean"] > 0  # the bounds were met


@pytest.mark.parametrize("entropy", [0.5, 0.1])
def test_adaptive_entropy_moves_as_trl_moves_it(entropy, tmp_path, generator, monkeypatch):
    """Over two windows of two micro-batches: the coefficient, what it acts on, and when."""
    seen = {}
    for kind in (Trainer, GRPOTrainer):
        settings = dict(use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=0.3, entropy_coef_delta=0.04)
        ours = trainer(Trainer, tmp_path, **settings, entropy_coef_max=0.15)
        ours.current_gradient_accumulation_steps = 2
        seen[kind] = []
        for step in range(6):
            monkeypatch.setattr(ours.accelerator.gradient_state, "sync_gradients", step % 2 == 1)
            logp = (-3.0 + torch.arange(B * T).view(B, T) / 30).double().requires_grad_()
            answer = (logp, logp * 0.0 + entropy + 0.01 * step, None)
            monkeypatch.setattr(ours, "_get_per_token_logps_and_entropies", lambda *_, answer=answer, **__: answer)
            inputs = batch(torch.Generator().manual_seed(step), torch.float64)
            loss = kind._compute_loss(ours, ours.model, inputs)
            seen[kind].append((loss.item(), ours.entropy_coef, ours._last_world_entropy))
        seen[kind].append(tuple(ours._metrics["train"]["entropy_coef"]))
    for mine, theirs in zip(seen[Trainer], seen[GRPOTrainer], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert len(set(seen[Trainer][-1])) > 1


@pytest.mark.parametrize("width", [1, T])
def test_rollout_correction_and_tool_tokens(width, tmp_path, generator, monkeypatch):
    """Weights of tokens or of sequences, and tokens that tools wrote: attended to, not learnt from."""
    ours = trainer(Trainer, tmp_path, loss_type="bnpo")
    ours.use_vllm = ours.vllm_importance_sampling_correction = True  # no engine here: the weights are given
    ours.current_gradient_accumulation_steps = 2
    inputs = batch(generator, torch.float64)
    inputs["tool_mask"] = (torch.rand(B, T, generator=generator) < 0.7).long()
    inputs["importance_sampling_ratio"] = torch.rand(B, width, generator=generator).double() + 0.5
    start = -3.0 + torch.randn(B, T, generator=generator).double() * 0.3
    found = []
    for kind in (Trainer, GRPOTrainer):
        logp = start.clone().requires_grad_()
        asked = []

        def answer(model, ids, attention, *_, logp=logp, asked=asked, **__):
            asked.append(attention)
            return logp, logp.detach(), None

        monkeypatch.setattr(ours, "_get_per_token_logps_and_entropies", answer)
        loss = kind._compute_loss(ours, ours.model, dict(inputs))
        found.append((loss.detach(), *torch.autograd.grad(loss, logp), asked[0]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-16)
    assert found[0][1][inputs["tool_mask"] == 0].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_a_model(name, tmp_path, generator):
    """TRL's head computes in float32 whatever its inputs: both sides differ from float64 by rounding."""
    network = tiny.model(seed=3, tie_word_embeddings=name == "dapo")
    settings = LOSSES[name] | {"beta": 0.0}
    host, ours = (trainer(kind, tmp_path, copy.deepcopy(network), **settings) for kind in (GRPOTrainer, Trainer))
    inputs = batch(generator)
    for side in (host, ours):
        side.model.train()
        side.current_gradient_accumulation_steps = 2
    ids, mask = (torch.cat((inputs[f"prompt_{x}"], inputs[f"completion_{x}"]), 1) for x in ("ids", "mask"))
    with torch.no_grad():
        logp, _, _ = host._get_per_token_logps_and_entropies(host.model, ids, mask, T, compute_entropy=True)
    inputs["old_per_token_logps"] = drifted(logp, generator)
    losses = [side._compute_loss(side.model, dict(inputs)) for side in (host, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
    pairs = dict(host.model.named_parameters())
    assert set(pairs) == {key for key, _ in ours.model.named_parameters()}
    for key, parameter in ours.model.named_parameters():
        wanted = pairs[key].grad
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-8, key
        assert wanted.any(), key


def test_training_follows_trl(tmp_path):
    """Two optimiser steps with generation, rewards and clipping of ratios in the second: the same weights and logs."""
    weights, logs = {}, {}
    for kind in (GRPOTrainer, Trainer):
        torch.manual_seed(5)
        run = trainer(kind, tmp_path, tiny.model(seed=4), loss_type="dapo", max_steps=2, num_iterations=2, seed=5)
        run.train()
        weights[kind] = {name: value.detach() for name, value in run.model.named_parameters()}
        logs[kind] = [row for row in run.state.log_history if "loss" in row]
    for name, value in weights[Trainer].items():
        torch.testing.assert_close(value, weights[GRPOTrainer][name], rtol=1e-3, atol=2e-5)
    assert len(logs[Trainer]) == 2 and float(logs[Trainer][1]["clip_ratio/region_mean"]) > 0
    for mine, theirs in zip(logs[Trainer], logs[GRPOTrainer], strict=True):
        for key in ("loss", "entropy", "clip_ratio/region_mean", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    start = tiny.model(seed=4)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(start.parameters(), weights[Trainer].values(), strict=True))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, "loss_type='luspo'"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"top_entropy_quantile": 0.8}, "top_entropy_quantile"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings, named, tmp_path):
    with pytest.raises(NotImplementedError, match=named):
        trainer(Trainer, tmp_path, **settings)


def test_an_untested_trl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("prism_fast.integrations.trl.version", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match=r"1\.17\.0"):
        trainer(Trainer, tmp_path)


def test_example_runs(tmp_path, monkeypatch, capsys):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", str(tmp_path / "model")])
    runpy.run_path(str(ROOT / "examples" / "trl_grpo.py"), run_name="__main__")
    assert capsys.readouterr().out.count("'clip_ratio/region_mean'") == 2
