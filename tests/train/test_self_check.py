"""The check before a stage's first update: rounding passes, every way to pack wrongly stops the stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from prism_fast import ops
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import CONTROLS, OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.models import packing, shared_prefix
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.packing import PromptGroup, SharedImages
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.protocol import Completion
from prism_fast.train import layouts
from prism_fast.train.discriminator_trainer import end_states
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, response_states
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.self_check import SPARSE_TOLERANCE, TOLERANCE, PackingError, check_packing, choose
from tests.support.small_policy import SMALL
from tests.support.trainers import discriminate, update_policy

SIZE = dataclasses.replace(SMALL, num_layers=3)
WHOLE = 10**6


@pytest.fixture(scope="module")
def prompts(processor):
    """Without image, with one, with two."""
    rng = np.random.default_rng(3)
    made = []
    for text, sizes in (("no image", []), ("what is this?", [(96, 64)]), ("and these?", [(64, 32), (32, 32)])):
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        made.append(processor.encode_prompt([{"role": "user", "content": content}], images))
    return made


def tokens(generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())


@pytest.fixture
def groups(prompts, generator) -> list[PromptGroup]:
    lengths = ((5, 4), (None, 6, 1, 3, 9), (None,))
    return [
        PromptGroup(prompt, [None if n is None else tokens(generator, n) for n in of])
        for prompt, of in zip(prompts, lengths, strict=True)
    ]


def engine_of(processor, kind: str) -> LocalEngine:
    model = build_tiny_policy(processor, SIZE, seed=2)
    if kind == "discriminator":
        model = build_discriminator(model, seed=3, head_std=0.2)
    use_layout("shared_prefix", getattr(model, "backbone", model))
    return LocalEngine(model.train(), OptimizerConfig(lr=1e-3))


def backbone_of(engine: LocalEngine):
    return getattr(engine.module, "backbone", None) or engine.module.model


KINDS = ("policy", "discriminator")


def span_groups(groups) -> list[ScoredGroup]:
    """Whole responses: the first branch is the teacher's. Of the groups with two or more: one alone shares nothing."""
    used = [g for g in groups if len(g.branches) > 1]
    return [ScoredGroup(g.prompt, (g.branches[0] or (7,),), [(x,) for x in g.branches[1:] if x]) for g in used]


def checked(engine: LocalEngine, processor, groups, kind: str) -> float:
    """:func:`check_packing` of what the kind's update reads."""
    read = response_states
    if kind == "discriminator":
        spans = span_groups(groups)
        groups, read = [group.computed() for group in spans], end_states
    return check_packing(backbone_of(engine), choose(groups), read, budget=WHOLE, pad_id=processor.pad_id)


def update(engine: LocalEngine, processor, groups, kind: str, budget: int = WHOLE) -> float | None:
    """A stage's update; the metric ``packing_error``."""
    shared = {"budget": TokenBudget(budget, notify=pytest.fail), "pad_id": processor.pad_id, "layout": "shared_prefix"}
    if kind == "policy":
        rows = [(g, ids) for g, group in enumerate(groups) for ids in group.branches if ids is not None]
        completions = [Completion(ids, (-5.0,) * len(ids), 1.0, "stop") for _, ids in rows]
        prompts, advantage = [group.prompt for group in groups], torch.ones(len(rows))
        batch = PolicyBatch(prompts, [g for g, _ in rows], completions, advantage)
        numbers = update_policy(engine, batch, policy_options("grpo", max_response=20), temperature=1.0, **shared)
        return numbers.get("policy/packing_error")
    options = {"semantics": "prism_fast", "score_clip": 10.0, "score_reg": 0.001, "learn": True}
    return discriminate(engine, span_groups(groups), **options, **shared).packing_error


def test_checked_are_a_group_with_images_and_another(groups):
    found = choose(groups)
    assert [[b is not None for b in group.branches] for group in found] == [
        [True, True],
        [False, True, True, True, False],
        [False],
    ]
    assert all(a.prompt is b.prompt for a, b in zip(found, groups, strict=True))
    assert choose(groups[2:]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_stays_far_below_the_tolerance_and_nothing_is_left_behind(processor, groups, dtype, kind):
    engine = engine_of(processor, kind)
    backbone = backbone_of(engine).to(dtype)
    frozen = backbone.language_model.embed_tokens.weight.requires_grad_(False)
    found = checked(engine, processor, groups, kind)
    assert 0 < found < TOLERANCE[dtype] / 2
    assert not [name for name, p in backbone.named_parameters() if p.grad is not None]
    assert [p is frozen for p in backbone.parameters()] == [not p.requires_grad for p in backbone.parameters()]


def test_a_frozen_model(processor, groups):
    engine = engine_of(processor, "policy")
    backbone = backbone_of(engine).requires_grad_(False)
    assert 0 < checked(engine, processor, groups, "policy") < 1e-5
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_once_per_engine_and_with_a_number_at_the_first_update_only(processor, groups, kind, monkeypatch):
    engine = engine_of(processor, kind)
    first = update(engine, processor, groups, kind)
    assert 0 < first < SPARSE_TOLERANCE
    assert update(engine, processor, groups, kind) is None
    resumed = engine_of(processor, kind)
    resumed.updates = 7
    assert update(resumed, processor, groups, kind) is None and resumed.packing_checked


def wrong_attention(monkeypatch, change: Callable) -> None:
    right = shared_prefix.ops.shared_prefix_attention

    def wrong(q, k, v, layout, *, scale):
        return right(*change(q, k, v, layout), scale=scale)

    monkeypatch.setattr(shared_prefix.ops, "shared_prefix_attention", wrong)


def branches_see_each_other(monkeypatch) -> None:
    def one_sequence(q, k, v, layout):
        cu = torch.stack((layout.cu_branch[0], layout.cu_branch[-1]))
        longest = int(cu[-1])
        nothing = layout.prefix_start[:0]
        sequence = ops.PrefixLayout(cu, nothing, nothing, cu.new_tensor([-1]), 0, longest)
        return q, k, v, sequence

    wrong_attention(monkeypatch, one_sequence)


def another_groups_prompt(monkeypatch) -> None:
    wrong_attention(monkeypatch, lambda q, k, v, layout: (q, k, v, _first_prefix(layout)))


def _first_prefix(layout):
    return layout._replace(branch_prefix=layout.branch_prefix.clamp(max=0), max_queries=None, prepared=None)


def keys_without_gradient(monkeypatch) -> None:
    wrong_attention(monkeypatch, lambda q, k, v, layout: (q, k.detach(), v, layout))


def wrong_rows(monkeypatch, change: Callable[[packing.PackedRow], packing.PackedRow]) -> None:
    right = layouts.pack
    monkeypatch.setattr(layouts, "pack", lambda *args, **kwargs: [change(row) for row in right(*args, **kwargs)])


def positions_count_image_tokens(monkeypatch) -> None:
    def change(row):
        places = row.position_ids.clone()
        for number, prefix in enumerate(row.layout.branch_prefix.tolist()):
            start, end = row.layout.cu_branch[number : number + 2].tolist()
            if prefix >= 0:
                places[:, 0, start:end] = int(row.layout.prefix_len[prefix]) + torch.arange(end - start)
        return dataclasses.replace(row, position_ids=places)

    wrong_rows(monkeypatch, change)


def the_row_before_is_scored(monkeypatch) -> None:
    wrong_rows(monkeypatch, lambda row: dataclasses.replace(row, span_end=row.span_end - 1))


def a_first_token_predicted_by_itself(monkeypatch) -> None:
    def change(row):
        index = row.predict.index.clone()
        cu = row.predict.cu_seqlens.long()
        first = cu[:-1][cu.diff() > 1]
        index[first] = index[first + 1]
        return dataclasses.replace(row, predict=row.predict._replace(index=index))

    wrong_rows(monkeypatch, change)


def deepstack_one_row_late(monkeypatch) -> None:
    right = packing.place_images

    def place(embeds, images, slot):
        out, visual = right(embeds, images, slot)
        return out, visual | {"visual_pos_masks": visual["visual_pos_masks"].roll(1, dims=1)}

    monkeypatch.setattr(packing, "place_images", place)


def deepstack_without_gradient(monkeypatch) -> None:
    right = packing.place_images

    def place(embeds, images, slot):
        return right(embeds, images._replace(levels=tuple(level.detach() for level in images.levels)), slot)

    monkeypatch.setattr(packing, "place_images", place)


def shared_images_forget_a_row(monkeypatch) -> None:
    def finish(self, row, backward):
        self._encoded.clear()

    monkeypatch.setattr(SharedImages, "finish", finish)


BREAKS = [
    (branches_see_each_other, "both", "states"),
    (another_groups_prompt, "both", "states"),
    (keys_without_gradient, "both", "gradient of"),
    (positions_count_image_tokens, "both", "states"),
    (the_row_before_is_scored, "discriminator", "states"),
    (a_first_token_predicted_by_itself, "policy", "states"),
    (deepstack_one_row_late, "both", "states"),
    (deepstack_without_gradient, "both", "gradient of the first DeepStack merger's norm 1.00"),
    (shared_images_forget_a_row, "both", "cut into sub-groups: .*gradient of the vision tower's first norm"),
]


@pytest.mark.parametrize(
    ("spoil", "kind", "what"),
    [(s, k, w) for s, kinds, w in BREAKS for k in KINDS if kinds in ("both", k)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_packing_stops_the_update(processor, groups, monkeypatch, spoil, kind, what):
    engine = engine_of(processor, kind)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    spoil(monkeypatch)
    with pytest.raises(PackingError, match=rf"{what}.*allowed .* set layout=padded"):
        update(engine, processor, groups, kind)
    assert engine.updates == 0 and all(torch.equal(before[n], p) for n, p in engine.module.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in engine.module.parameters())


@pytest.mark.parametrize("stage", ["sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr"])
def test_every_packed_stage_checks_before_it_learns(finished, run_again, tmp_path, monkeypatch, stage):
    export = finished / "export"
    stages = f"[{stage},rlvr]" if stage in CONTROLS else f"[{stage}]"
    start = [f"model.policy={export / 'sft'}", f"stages={stages}", "data.eval=null"]
    start += [f"model.discriminator={export / 'discriminator-warmup'}"] if stage == "align" else []
    branches_see_each_other(monkeypatch)
    with pytest.raises(PackingError):
        run_again(tmp_path / "run", *start)


def test_a_padded_run_is_not_checked(processor, groups, monkeypatch):
    branches_see_each_other(monkeypatch)
    engine = engine_of(processor, "policy")
    numbers = update_policy(
        engine,
        PolicyBatch([groups[0].prompt], [0], [Completion((1, 2), (-5.0,) * 2, 1.0, "stop")], torch.ones(1)),
        policy_options("grpo", max_response=20),
        temperature=1.0,
        budget=TokenBudget(WHOLE, notify=pytest.fail),
        pad_id=processor.pad_id,
        layout="padded",
    )
    assert "policy/packing_error" not in numbers and not engine.packing_checked
