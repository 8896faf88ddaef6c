"""Gradient checkpointing changes memory and passes and no bit: every update, both layouts, cut or whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.data.samples import Demonstration
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.report.html import write_report
from prism_fast.rollout.protocol import Completion
from prism_fast.track.metrics import reproducible
from prism_fast.train.layouts import use_layout
from prism_fast.train.passes import Passes
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.sft import encode
from tests.support.live_bytes import LiveBytes
from tests.support.small_policy import SMALL
from tests.support.trainers import discriminate, passes_of, update_policy, update_sft

WHOLE = 10**6
SIZE = replace(SMALL, num_layers=4, deepstack_layers=(0, 1))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(processor):
    rng = np.random.default_rng(3)
    made = []
    for text, size in (("what is this?", (96, 64)), ("no image", None)):
        images = [] if size is None else [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        made.append(([{"role": "user", "content": content}], images))
    return made


def text(generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())


def measured(model: nn.Module, step: Callable[[LocalEngine], Passes]) -> tuple[dict[str, Tensor], Passes, int]:
    """Gradients, passes and peak of live bytes of one step on a copy of ``model``."""
    engine = LocalEngine(copy.deepcopy(model).train(), OptimizerConfig(lr=1e-3))
    engine.step = lambda: Update(0.0, 0.0)
    engine.packing_checked = True
    with LiveBytes() as live:
        passes = step(engine)
    return {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}, passes, live.peak


def compare(model: nn.Module, step: Callable[[LocalEngine], Passes], *, images: int, parts: int, scored: int = 0):
    """The same step without and with checkpointing; ``scored``: passes without gradient that belong to it."""
    kept, plain, peak = measured(model, step)
    use_gradient_checkpointing(model)
    found, again, lower = measured(model, step)
    assert plain == Passes(parts, scored, 0, images)
    assert again == Passes(parts, scored, parts, images)
    assert found.keys() == kept.keys() and len(kept) > 50
    for name, gradient in kept.items():
        assert torch.equal(found[name], gradient), name
    return lower / peak


@pytest.mark.parametrize(("layout", "budget", "parts"), [("shared_prefix", WHOLE, 1), ("shared_prefix", 60, 3)])
def test_policy(processor, prompts, generator, layout, budget, parts):
    model = build_tiny_policy(processor, SIZE, seed=4)
    use_layout(layout, model)
    encoded = [processor.encode_prompt(*prompt) for prompt in prompts]
    completions = [Completion(ids, (-5.0,) * len(ids), 1.0, "stop") for ids in (text(generator, n) for n in (20, 9, 7))]
    batch = PolicyBatch(encoded, [0, 0, 1], completions, torch.tensor([0.5, -1.0, 2.0]))

    def step(engine: LocalEngine) -> Passes:
        shared = {"temperature": 1.0, "pad_id": processor.pad_id, "layout": layout}
        options = policy_options("prism", max_response=20)
        numbers = update_policy(engine, batch, options, budget=TokenBudget(budget, notify=pytest.fail), **shared)
        return passes_of(numbers, "policy")

    share = compare(model, step, images=1, parts=parts)
    assert share < (0.6 if parts == 1 else 0.8), share


@pytest.mark.parametrize("aux_coef", [0.0, 0.5], ids=["alignment", "warm-up"])
@pytest.mark.parametrize(
    ("layout", "budget", "parts", "scored"),
    [("shared_prefix", WHOLE, 1, 0), ("padded", WHOLE, 1, 0), ("shared_prefix", 60, 3, 3)],
)
def test_discriminator(processor, prompts, generator, layout, budget, parts, scored, aux_coef):
    model = build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3, head_std=0.2)
    use_layout(layout, model.backbone)
    spans = [(text(generator, 9), text(generator, 14)) for _ in range(3)]
    groups = [ScoredGroup(processor.encode_prompt(*prompts[0]), spans[0], [*spans[1:2], None])]

    def step(engine: LocalEngine) -> Passes:
        options = {"semantics": "prism_fast", "score_clip": 10.0, "score_reg": 0.001, "aux_coef": aux_coef}
        options |= {"pad_id": processor.pad_id, "layout": layout, "learn": True}
        return discriminate(engine, groups, TokenBudget(budget, notify=pytest.fail), **options).passes

    counted = scored and aux_coef > 0  # the experts' shares of a cut step come from a pass of their own
    share = compare(model, step, images=1 + counted, parts=parts, scored=scored * (1 + counted))
    assert share < 0.8, share


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_sft(processor, prompts, layout):
    model = build_tiny_policy(processor, SIZE, seed=1)
    use_layout(layout, model)
    demos = [
        Demonstration(str(n), messages, "- digits: 1 2 and more", images)
        for n, (messages, images) in enumerate(prompts)
    ]

    encoded = encode(demos, processor)

    def step(engine: LocalEngine) -> Passes:
        budget = TokenBudget(WHOLE, notify=pytest.fail)
        numbers = update_sft(engine, encoded, budget, layout=layout, pad_id=processor.pad_id)
        return passes_of(numbers, "policy")

    assert compare(model, step, images=1, parts=1) < 0.7


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="Linear holds no model of transformers"):
        use_gradient_checkpointing(nn.Linear(2, 2))


def lines(folder) -> list[dict]:
    """Metrics without wall-clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records]


def test_every_stage_takes_it_from_the_configuration_and_says_which_passes_ran(finished, run_again, tmp_path):
    short = [
        "sft.max_updates=2",
        "sft.eval_every=2",
        "align.steps=1",
        "rlvr.steps=1",
        "rlvr.prompts=8",
        "warmup.eval_every=1",
    ]
    short += ["warmup.max_updates=1", "data.eval=null", f"model.policy={finished / 'export' / 'sft'}"]
    found = {}
    for on in ("false", "true"):
        folder = run_again(tmp_path / on, *short, f"model.gradient_checkpointing={on}")
        found[on] = lines(folder)
    stages: dict[str, int] = {}
    for plain, again in zip(found["false"], found["true"], strict=True):
        for model in ("policy", "discriminator"):
            learned, recomputed = f"passes/{model}_learned", f"passes/{model}_recomputed"
            if learned not in plain:
                continue
            name = f"{plain['stage']} {model}"
            stages[name] = stages.get(name, 0) + plain[learned]
            assert plain.pop(recomputed) == 0 and again.pop(recomputed) == again[learned]
            # No scoring apart from learning, no old log-probs, no reference.
            assert plain[f"passes/{model}_without_gradient"] == 0
        assert plain == again
    assert set(stages) == {
        *("sft policy", "sft_continued policy", "rlvr_direct policy", "warmup discriminator"),
        *("align policy", "align discriminator", "rlvr policy"),
    }
    assert min(stages.values()) > 0, stages
    page = write_report(tmp_path / "true").read_text(encoding="utf-8")
    for name in ("learned", "without gradient", "recomputed", "images"):
        assert f">policy {name}<" in page and f">discriminator {name}<" in page
