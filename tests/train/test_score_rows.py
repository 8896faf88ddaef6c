"""The last layer computes the rows that are scored and no others; scores and gradients are those of all rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer, Qwen3VLMoeTextRMSNorm

from prism_fast.models.discriminator import Discriminator, build_discriminator
from prism_fast.models.forward import collate
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.score_rows import LastLayer
from prism_fast.train.layouts import use_layout
from prism_fast.train.scored_group import ScoredGroup
from tests.support.float64 import Float64Islands
from tests.support.small_policy import SMALL
from tests.support.trainers import score_and_learn

SIZE = replace(SMALL, num_layers=3, deepstack_layers=(0, 1))
WHOLE = 10**6


@pytest.fixture
def groups(processor, generator) -> list[ScoredGroup]:
    """With an image and without, with a tie, an invalid student and an empty span."""
    pixels = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    made = []
    for text, images in (("what is this?", [Image.fromarray(pixels)]), ("no image", [])):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        made.append(processor.encode_prompt([{"role": "user", "content": content}], images))

    def span(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())

    first = (span(4), span(7))
    return [
        ScoredGroup(made[0], first, [(span(3), span(9)), None, (first[0], span(5))]),
        ScoredGroup(made[1], (span(2), span(6)), [(span(11), ())]),
    ]


def discriminator(processor, seed: int = 2, size: TinyPolicy = SIZE) -> Discriminator:
    model = build_discriminator(build_tiny_policy(processor, size, seed=seed), seed=seed + 1, head_std=0.2).double()
    use_layout("shared_prefix", model.backbone)
    return model.train()


def every_row(model: Discriminator) -> Discriminator:
    """The same model with the stock last layer."""
    layer = model.backbone.language_model.layers[-1]
    assert type(layer) is LastLayer
    layer.__class__ = Qwen3VLMoeTextDecoderLayer
    return model


def step(model: Discriminator, groups, processor, layout: str, budget: int, **options):
    """Scores, loss and gradients of one step."""
    scores = score_and_learn(model, groups, tokens=budget, layout=layout, pad_id=processor.pad_id, **options)
    return scores, scores.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Counter:
    """Rows that the last layer's experts, its router and the final norm were given."""

    def __init__(self, model: Discriminator) -> None:
        self.experts, self.router, self.norm = [], [], []
        language = model.backbone.language_model
        for module, kept in (
            (language.layers[-1].mlp.experts, self.experts),
            (language.layers[-1].mlp.gate, self.router),
            (language.norm, self.norm),
        ):
            module.register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0].numel() // SIZE.hidden_size)
            )
        assert type(language.norm) is Qwen3VLMoeTextRMSNorm


@pytest.mark.parametrize("aux_coef", [0.0, 0.5], ids=["alignment", "warm-up"])
@pytest.mark.parametrize(("layout", "budget"), [("padded", WHOLE), ("shared_prefix", WHOLE), ("shared_prefix", 1)])
def test_scores_and_gradients_are_those_of_all_rows(processor, groups, layout, budget, aux_coef):
    model, full = discriminator(processor), every_row(discriminator(processor))
    with Float64Islands() as lifted:
        found = step(model, groups, processor, layout, budget, aux_coef=aux_coef)
        wanted = step(full, groups, processor, layout, budget, aux_coef=aux_coef)
    assert lifted.lifted > 50
    torch.testing.assert_close(found[0].student, wanted[0].student, rtol=1e-6, atol=1e-6)  # float32 on the outside
    assert found[1] == pytest.approx(wanted[1], rel=1e-12)
    assert found[2].keys() == wanted[2].keys() and len(found[2]) > 50
    router = "backbone.language_model.layers.2.mlp.gate.weight"
    assert float(found[2][router].norm()) > 0
    for name, gradient in wanted[2].items():
        error = float((found[2][name] - gradient).norm())
        assert error <= 1e-12 * float(gradient.norm()), f"{name}: {error / float(gradient.norm()):.1e}"


@pytest.mark.parametrize("aux_coef", [0.0, 0.5])
def test_rows_pass_through_gradient_checkpointing(processor, groups, aux_coef):
    model = discriminator(processor)
    counter = Counter(model)
    kept = step(model, groups, processor, "shared_prefix", WHOLE, aux_coef=aux_coef)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, groups, processor, "shared_prefix", WHOLE, aux_coef=aux_coef)
    assert counter.experts == [9, 9, 9], "computed, computed and computed again"
    assert again[1] == kept[1]
    for name, gradient in kept[2].items():
        torch.testing.assert_close(again[2][name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("aux_coef", [0.0, 0.5])
def test_experts_of_the_last_layer_see_one_row_per_span(processor, groups, layout, aux_coef):
    model = discriminator(processor)
    counter = Counter(model)
    scores, *_ = step(model, groups, processor, layout, WHOLE, aux_coef=aux_coef)
    spans = sum(len(group.spans()) for group in groups)
    assert spans == 9 and counter.experts == counter.norm == [spans]
    assert counter.router[0] >= scores.tokens > 5 * spans  # the load-balancing loss is that of all tokens
    full = every_row(discriminator(processor))
    counter = Counter(full)
    step(full, groups, processor, layout, WHOLE, aux_coef=aux_coef)
    assert counter.experts == counter.norm == counter.router


def test_where_deepstack_reaches_the_last_layer_every_row_is_computed(processor, groups):
    model = discriminator(processor, size=replace(SIZE, num_layers=2))
    assert type(model.backbone.language_model.layers[-1]) is Qwen3VLMoeTextDecoderLayer
    with Float64Islands():
        packed, _, gradients = step(model, groups, processor, "shared_prefix", WHOLE)
        padded, _, wanted = step(model, groups, processor, "padded", WHOLE)
    torch.testing.assert_close(packed.student, padded.student, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted.keys()


def test_the_padded_forward_of_the_model_scores_the_same_rows(processor, groups):
    model = discriminator(processor).eval()
    spans = groups[0].spans()
    batch = collate(
        [groups[0].prompt], [0] * len(spans), spans, model_config=model.backbone.config, pad_id=processor.pad_id
    )
    earlier = batch.lengths - 2
    found = [model(batch), model(batch, last=earlier)]
    every_row(model)
    for one, other in zip(found, [model(batch), model(batch, last=earlier)], strict=True):
        torch.testing.assert_close(one.score, other.score, rtol=1e-12, atol=1e-12)
        assert [x.shape for x in one.router_logits] == [x.shape for x in other.router_logits]


def test_a_failed_forward_leaves_no_rows_behind(processor, groups, monkeypatch):
    model = discriminator(processor)
    block = model.backbone.language_model.layers[-1].mlp

    def fail(*args: object, **kwargs: object) -> None:
        assert block.rows is not None
        raise KeyError("broken")

    monkeypatch.setattr(block.experts, "forward", fail)
    with pytest.raises(KeyError):
        step(model, groups, processor, "shared_prefix", WHOLE)
    assert block.rows is None
