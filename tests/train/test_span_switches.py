"""A head and a routing bias per kind of span, through a step in every layout: gradients, cuts and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.config import ConfigError, OptimizerConfig, load_config
from prism_fast.models.discriminator import (
    Discriminator,
    build_discriminator,
    load_balance_loss,
    load_discriminator,
)
from prism_fast.models.forward import collate
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.scorer import SpanSwitches
from prism_fast.models.span_bias import SpanLayer
from prism_fast.report.experts import expert_charts
from prism_fast.report.html import write_report
from prism_fast.report.rundir import read_run
from prism_fast.train.discriminator_update import SpanGroup
from prism_fast.train.engine import LocalEngine
from prism_fast.train.expert_shares import centred, learned_numbers
from prism_fast.train.layouts import prepare
from prism_fast.train.pipeline import run_stages
from prism_fast.train.signals import Stopped
from tests.support.float64 import Float64Islands
from tests.train.conftest import run_small
from tests.train.test_score_rows import SIZE, WHOLE, groups, step  # noqa: F401

BOTH = SpanSwitches("per_span", "span")
ON = ["align.discriminator.heads=per_span", "align.discriminator.routing_bias=span"]
LAYOUTS = [("padded", WHOLE), ("padded", 1), ("shared_prefix", WHOLE), ("shared_prefix", 1)]
BIAS, HEAD = "routing_bias", "v_head.1.weight"


def build(processor, switches: SpanSwitches | None = BOTH) -> Discriminator:
    policy = build_tiny_policy(processor, SIZE, seed=2)
    model = build_discriminator(policy, seed=3, head_std=0.2, router_std=0.3, switches=switches)
    prepare("shared_prefix", model.backbone)
    return model.train()


@pytest.fixture
def learnt(processor, generator) -> Discriminator:
    """With both on, in float64, and values that show."""
    model = build(processor).double()
    with torch.no_grad():
        model.routing_bias.copy_(torch.randn(model.routing_bias.shape, generator=generator))
        model.v_head[1].weight.add_(0.2 * torch.randn(model.v_head[1].weight.shape, generator=generator))
    return model


@pytest.mark.parametrize(("layout", "budget"), LAYOUTS)
def test_switched_on_the_first_step_is_the_same_to_the_bit(processor, groups, layout, budget):  # noqa: F811
    off, on = (step(build(processor, s), groups, processor, layout, budget, aux_coef=0.5) for s in (None, BOTH))
    assert torch.equal(off[0].student, on[0].student) and torch.equal(off[0].teacher, on[0].teacher)
    assert torch.equal(off[1], on[1]) and off[0].experts.items() <= on[0].experts.items()
    assert on[2].keys() - off[2].keys() == {BIAS}
    for name, gradient in off[2].items():
        if name != HEAD:
            assert torch.equal(gradient, on[2][name]), name
    torch.testing.assert_close(on[2][HEAD].sum(0, keepdim=True), off[2][HEAD], rtol=1e-5, atol=1e-7)
    assert float(on[2][HEAD][0].norm()) > 0 and float(on[2][HEAD][1].norm()) > 0
    assert bool((on[2][BIAS].norm(dim=-1) > 0).all()), "every layer's bias of both kinds learns"


def plain_step(model: Discriminator, groups: list[SpanGroup], processor, aux_coef: float):  # noqa: F811
    """The same loss from one forward per span, prompt in front; the model's own forward, nothing shared."""

    def forward(group, column, span):
        kind = torch.tensor([column])
        batch = collate([group.prompt], [0], [span], model_config=model.backbone.config, pad_id=processor.pad_id)
        return model(batch, kind=kind)

    found = {(g, *key): forward(group, *key) for g, group in enumerate(groups) for key in group.spans()}
    teacher = torch.stack([found[g, c, s].score[0] for g, x in enumerate(groups) for c, s in enumerate(x.teacher)])
    rows = [(g, framed) for g, group in enumerate(groups) for framed in group.students]
    none = torch.zeros((), dtype=torch.float64)
    student = [found[g, c, x[c]].score[0] if x else none for g, x in rows for c in range(2)]
    valid = sum(framed is not None for _, framed in rows)
    loss, _ = discriminator_loss(
        teacher.view(-1, 2),
        torch.stack(student).view(-1, 2),
        torch.tensor([g for g, _ in rows]),
        torch.tensor([x is not None for _, x in rows]),
        semantics="prism_fast",
        score_clip=10.0,
        score_reg=0.001,
        denominator=valid,
        l2_denominator=2 * (len(groups) + valid),
    )
    logits = tuple(torch.cat(layer) for layer in zip(*(out.router_logits for out in found.values()), strict=True))
    text = model.backbone.config.text_config
    balance = load_balance_loss(logits, text.num_experts, text.num_experts_per_tok)
    return loss + aux_coef * balance, torch.stack(student).view(-1, 2)


@pytest.mark.parametrize("aux_coef", [0.0, 0.5], ids=["alignment", "warm-up"])
def test_every_layout_and_cut_gives_the_plain_gradient(processor, groups, learnt, aux_coef):  # noqa: F811
    with Float64Islands() as lifted:
        loss, student = plain_step(learnt, groups, processor, aux_coef)
        learnt.zero_grad(set_to_none=True)
        loss.backward()
        wanted = {name: p.grad.clone() for name, p in learnt.named_parameters() if p.grad is not None}
        assert all(float(part.norm()) > 0 for part in (*wanted[BIAS].flatten(0, 1), *wanted[HEAD]))
        for layout, budget in LAYOUTS:
            scores, found, gradients = step(learnt, groups, processor, layout, budget, aux_coef=aux_coef)
            torch.testing.assert_close(scores.student, student.float(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0.0)
            assert gradients.keys() == wanted.keys()
            for name, gradient in wanted.items():
                error = float((gradients[name] - gradient).norm())
                assert error <= 1e-12 * float(gradient.norm()), f"{name} at {layout}, {budget}: {error:.1e}"
    assert lifted.lifted > 50


def test_the_biass_gradient_is_the_slope_of_the_loss(processor, groups, learnt):  # noqa: F811
    with Float64Islands():
        slopes = step(learnt, groups, processor, "shared_prefix", WHOLE, aux_coef=0.5)[2][BIAS]
        for place in ((0, 0, 1), (1, 1, 3), (2, 0, 2)):
            ends = []
            for shift in (1e-6, -2e-6):
                learnt.routing_bias.data[place] += shift
                ends.append(float(step(learnt, groups, processor, "shared_prefix", WHOLE, aux_coef=0.5)[1]))
            learnt.routing_bias.data[place] += 1e-6
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slopes[place]), rel=1e-5, abs=1e-9)


def test_the_last_layer_of_all_rows_gives_the_same(processor, groups, learnt):  # noqa: F811
    with Float64Islands():
        found = step(learnt, groups, processor, "shared_prefix", 1, aux_coef=0.5)
        learnt.backbone.language_model.layers[-1].__class__ = SpanLayer
        wanted = step(learnt, groups, processor, "shared_prefix", 1, aux_coef=0.5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=0.0)
    for name in (BIAS, HEAD):
        torch.testing.assert_close(found[2][name], wanted[2][name], rtol=1e-11, atol=1e-14)


def test_gradient_checkpointing_hands_the_bias_on(processor, groups, learnt):  # noqa: F811
    kept = step(learnt, groups, processor, "shared_prefix", WHOLE, aux_coef=0.5)
    learnt.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(learnt, groups, processor, "shared_prefix", WHOLE, aux_coef=0.5)
    assert torch.equal(again[1], kept[1])
    for name in (BIAS, HEAD):
        torch.testing.assert_close(again[2][name], kept[2][name], rtol=1e-12, atol=1e-15)
    blocks = [layer.mlp for layer in learnt.backbone.language_model.layers]
    assert all(block.bias is None and block.rows is None for block in blocks)


def test_a_bias_can_part_the_experts(processor, groups, learnt):  # noqa: F811
    bias = torch.tensor([[50.0, 50.0, 0.0, 0.0], [0.0, 0.0, 50.0, 50.0]])
    learnt.routing_bias.data.copy_(bias.expand_as(learnt.routing_bias))
    for layout, budget in LAYOUTS[1:]:
        numbers = step(learnt, groups, processor, layout, budget)[0].experts
        assert numbers["expert_span_information"] == 1.0
        assert numbers["experts_caption_0"] == numbers["experts_reasoning_3"] == 0.5
        assert numbers["experts_caption_2"] == 0.0 and 0 < numbers["experts_prompt_0"] < 0.5
        assert numbers["routing_bias_caption"] == numbers["routing_bias_reasoning"] == 25.0


def test_one_text_as_caption_and_as_reasoning_has_two_scores(processor, groups, learnt):  # noqa: F811
    text = groups[0].teacher[0]
    same = [SpanGroup(groups[0].prompt, (text, text), [(groups[0].teacher[1], text)])]
    for layout, budget in LAYOUTS:
        scores = step(learnt, same, processor, layout, budget)[0]
        assert scores.teacher[0, 0] != scores.teacher[0, 1] == scores.student[0, 1]


def test_metrics_of_what_is_learned(processor, learnt):
    assert learned_numbers(build(processor, SpanSwitches())) == {}
    assert learned_numbers(build(processor)) == {
        "routing_bias_caption": 0.0,
        "routing_bias_reasoning": 0.0,
        "heads_cosine": pytest.approx(1.0, abs=1e-6),
    }
    found = learned_numbers(learnt)
    bias, (caption, reasoning) = learnt.routing_bias.detach(), learnt.v_head[1].weight.detach()
    rows = [row - row.mean() for row in bias[:, 1]]
    assert found["routing_bias_reasoning"] == pytest.approx(float(torch.stack(rows).square().mean().sqrt()))
    cosine = float(caption @ reasoning / caption.norm() / reasoning.norm())
    assert found["heads_cosine"] == pytest.approx(cosine) and cosine < 0.99


def test_whole_responses_are_refused(processor, groups):  # noqa: F811
    whole = [SpanGroup(groups[0].prompt, ((5, 6),), [((7, 8),)])]
    with pytest.raises(ValueError, match="a score head for captions.*not 1 text"):
        step(build(processor, SpanSwitches(heads="per_span")), whole, processor, "padded", WHOLE)
    with pytest.raises(ValueError, match="a routing bias for captions.*not 1 text"):
        step(build(processor, SpanSwitches(routing_bias="span")), whole, processor, "padded", WHOLE)


@pytest.mark.parametrize("key", ["heads=per_span", "routing_bias=span"])
@pytest.mark.parametrize("other", ["align.discriminate=response", "semantics=released"])
def test_combinations_without_meaning_are_refused_by_name(key, other):
    with pytest.raises(ConfigError, match=f"align.discriminator.{key.partition('=')[0]} must be .* with {other}"):
        load_config("digits", [f"align.discriminator.{key}", other])


def test_a_bias_is_not_decayed_and_heads_are(processor):
    model = build(processor)
    decayed, exempt = (group["params"] for group in LocalEngine(model, OptimizerConfig()).optimizer.param_groups)
    assert any(p is model.v_head[1].weight for p in decayed) and any(p is model.routing_bias for p in exempt)
    assert all(p.ndim < 2 for p in exempt if p is not model.routing_bias)


def _metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


@pytest.fixture(scope="module")
def switched(finished, small_run, tmp_path_factory) -> tuple[list[str], Path]:
    """Warm-up from a discriminator with neither, then alignment, with both on."""
    export, out = finished / "export", tmp_path_factory.mktemp("switched") / "run"
    models = [f"model.policy={export / 'sft'}", f"model.discriminator={export / 'discriminator-warmup'}"]
    models.append(f"data.pairs={finished / 'data' / 'pairs' / 'pairs.jsonl'}")
    overrides = [*small_run, *models, *ON, "stages=[warmup,align]", "data.eval=null", "checkpoint_every=1"]
    return overrides, run_small(out, overrides)


def test_a_stopped_run_goes_on_to_the_bit(switched, tmp_path, monkeypatch):
    overrides, whole = switched
    config = load_config("digits", [*overrides, f"out={tmp_path / 'run'}"])
    update = LocalEngine.step

    def stop_in_the_first_alignment_step(engine):
        if engine.where == "align step 1" and isinstance(engine.model, Discriminator):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(engine)

    monkeypatch.setattr(LocalEngine, "step", stop_in_the_first_alignment_step)
    with pytest.raises(Stopped):
        run_stages(config, Console(quiet=True))
    monkeypatch.setattr(LocalEngine, "step", update)
    run_stages(config, Console(quiet=True), resume=True)
    assert _metrics(tmp_path / "run") == _metrics(whole)
    for name in ("discriminator-warmup", "discriminator"):
        one, other = ((f / "export" / name / "model.safetensors").read_bytes() for f in (tmp_path / "run", whole))
        assert one == other


def test_a_run_logs_and_shows_what_it_has_learned(switched):
    _, folder = switched
    for stage, prefix, export in (("warmup", "warmup", "discriminator-warmup"), ("align", "disc", "discriminator")):
        steps = [r for r in _metrics(folder) if r["stage"] == stage and f"{prefix}/loss" in r]
        sizes = [[step[f"{prefix}/routing_bias_{kind}"] for kind in ("caption", "reasoning")] for step in steps]
        assert min(sizes[-1]) > 0 and (stage == "align" or max(sizes[0]) == 0), "before a step's update, from 0 on"
        assert 0 < steps[-1][f"{prefix}/heads_cosine"] < 1
        model = load_discriminator(folder / "export" / export)
        assert model.scorer().switches == BOTH
        bias = next(f for chart, f in expert_charts(read_run(folder), stage) if chart.title == "Routing bias by layer")
        found = torch.tensor(bias["data"][0]["z"])
        torch.testing.assert_close(found, centred(model.routing_bias.detach()).flatten(1).float(), rtol=1e-3, atol=1e-6)
    assert "Two score heads" in write_report(folder).read_text(encoding="utf-8")
