"""Losses for verl's registry against what verl gave for them; `verl_parity.py` compares with verl itself."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from prism_fast.integrations import verl as ours

STORED = json.loads((Path(__file__).parents[1] / "golden" / "verl_losses.json").read_text())
MASK = torch.tensor(STORED["inputs"]["response_mask"])


class Actor(types.SimpleNamespace):
    """verl's ActorConfig as far as a loss reads it, with verl's defaults."""

    def __init__(self, info: dict, **settings: float) -> None:
        defaults = dict(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0)
        more = dict(tau_pos=1.0, tau_neg=1.05, loss_scale_factor=None)
        super().__init__(**defaults | more | settings)
        self.global_batch_info = info | {"loss_scale_factor": self.loss_scale_factor}

    def get(self, name: str, default: float) -> float:
        return getattr(self, name, default)


def inputs() -> dict[str, torch.Tensor]:
    numbers = {k: torch.tensor(v, dtype=torch.float64) for k, v in STORED["inputs"].items() if k != "response_mask"}
    return numbers | {"response_mask": MASK}


@pytest.mark.parametrize("row", STORED["rows"], ids=lambda r: f"{r['case']}-{'global' if r['global'] else 'local'}")
def test_loss_gradient_and_metrics(row):
    x = inputs()
    logp = x.pop("log_prob").requires_grad_()
    x["advantages"][~MASK] = torch.nan  # what verl leaves in padding is no concern of ours
    config = Actor(row["global"], **row["settings"])
    loss, metrics = ours.policy_loss(row["mode"], log_prob=logp, loss_agg_mode=row["aggregation"], config=config, **x)
    loss.backward()
    wanted = torch.tensor(row["gradient"], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, wanted, rtol=1e-12, atol=1e-16)
    assert loss.item() == pytest.approx(row["loss"], rel=1e-12, abs=1e-14)
    assert metrics == pytest.approx(row["metrics"], abs=1e-6)
    assert logp.grad[~MASK].eq(0).all() and logp.grad.any()


def test_the_registry_gets_all_of_them(monkeypatch):
    registry = {}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["verl.trainer.ppo.core_algos"].register_policy_loss = register_policy_loss
    assert ours.register() == tuple(registry) == ("prism_vanilla", "prism_gspo", "prism_cispo", "prism_sapo")
    row = next(r for r in STORED["rows"] if r["mode"] == "cispo" and not r["global"])
    config = Actor({}, **row["settings"])
    loss, _ = registry["prism_cispo"](**inputs(), loss_agg_mode=row["aggregation"], config=config)
    assert loss.item() == pytest.approx(row["loss"], rel=1e-12)


def test_what_is_not_offered_is_refused():
    with pytest.raises(ValueError, match="token-sum"):
        ours.policy_loss("vanilla", **inputs(), loss_agg_mode="token-sum", config=Actor({}))
    with pytest.raises(ValueError, match="gspo"):
        ours.policy_loss("gspo", **inputs(), loss_agg_mode="token-mean", config=Actor({}))
    with pytest.raises(ValueError, match="2 data-parallel ranks"):
        ours.policy_loss("vanilla", **inputs(), config=Actor({"dp_size": 2}))


def test_the_head_takes_the_shapes_that_verl_passes(generator):
    hidden = torch.randn(1, 6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (1, 6), generator=generator)
    logp, entropy = ours._fused_linear(None, hidden, weight, labels, temperature=0.7)
    wanted = torch.log_softmax(hidden @ weight.t() / 0.7, -1)
    torch.testing.assert_close(logp, wanted.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))
    (logp - entropy).sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.any()


def test_the_example_parses_and_names_registered_losses():
    text = (Path(__file__).parents[2] / "examples" / "verl_losses.py").read_text()
    ast.parse(text)
    assert "loss_mode=prism_vanilla" in text and len(text.splitlines()) <= 20
