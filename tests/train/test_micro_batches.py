"""The gradient of every stage is that of the whole step, however the step is laid out and cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.presets import PRESETS, policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.data.samples import Demonstration
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget, by_tokens
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.layouts import longest_item, plan_batches, use_layout
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.sft import encode, response_tokens
from tests.support.float64 import Float64Islands
from tests.support.small_policy import SMALL
from tests.support.trainers import discriminate, update_policy, update_sft

WHOLE = 10**6
# Relative and normwise: of the whole gradient, of each parameter's. Where the contributions of rows cancel (routers,
# biases of the vision tower), float32 itself leaves up to 1e-5 of a parameter's gradient open; float64 has the proof.
# Packed rows are compared with padded ones, another order of summing: twice the tolerance in float32.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 2e-5)}
SIZE = SMALL


@pytest.fixture(scope="module")
def prompts(processor):
    """Two prompts with an image of different sizes, one without; 20 to 60 tokens."""
    return [ask("what is this?", (64, 64)), ask("and this one here?", (96, 64)), ask("no image")]


def ask(text: str, *sizes: tuple[int, int]) -> tuple[list[dict], list[Image.Image]]:
    """Messages and images, random by their sizes."""
    rng = np.random.default_rng([3, *(n for size in sizes for n in size)])
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}], images


def both(*cuts: int) -> list[Cut]:
    """Each cut in padded batches, and in packed rows, which need a cut at all only where many tokens are left."""
    return [*(("padded", cut) for cut in cuts), *(("shared_prefix", cut) for cut in (WHOLE, *cuts))]


def engine_of(model: nn.Module, dtype: torch.dtype) -> LocalEngine:
    """An engine that keeps the gradients of a step instead of using them up."""
    engine = LocalEngine(model.to(dtype), OptimizerConfig(lr=1e-3))
    engine.step = lambda: Update(0.0, 0.0)
    return engine


Cut = tuple[str, int]  # layout and tokens per micro-batch


def compare(
    dtype: torch.dtype, engine: LocalEngine, step: Callable[[TokenBudget, str], object], cuts: list[Cut]
) -> None:
    """The step's gradient at each cut equals that of the padded step in one piece."""
    whole_tolerance, tolerance = TOLERANCE[dtype]
    use_layout("shared_prefix", getattr(engine.module, "backbone", engine.module))

    def gradients(layout: str, budget: int) -> dict[str, Tensor]:
        engine.discard()
        step(TokenBudget(budget, notify=pytest.fail), layout)
        return {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}

    lifted = Float64Islands() if dtype == torch.float64 else nullcontext()
    with lifted:
        whole = gradients("padded", WHOLE)
        assert len(whole) > 30 and sum(float(g.norm()) > 0 for g in whole.values()) > 30
        for cut in cuts:
            found = gradients(*cut)
            assert set(found) == set(whole)
            norm = {name: float(gradient.norm()) for name, gradient in whole.items()}
            error = {name: float((found[name] - whole[name]).norm()) for name in whole}
            worst = max(whole, key=lambda name: error[name] / max(norm[name], 1e-30))
            relative = error[worst] / max(norm[worst], 1e-30)
            assert relative < tolerance, f"{worst}: {relative:.1e} at {cut}"
            bound = whole_tolerance if cut[0] == "padded" or dtype == torch.float64 else 2 * whole_tolerance
            assert math.hypot(*error.values()) < bound * math.hypot(*norm.values()), cut
    assert dtype == torch.float32 or lifted.lifted > 50, "the models' islands were not met"


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def test_sft(processor, prompts, dtype, generator):
    """With no, one and two images, responses of one token (the end's) and more, a prompt that two share."""
    engine = engine_of(build_tiny_policy(processor, SIZE, seed=1), dtype)
    texts = ["1 2", "- digits: 1 2\n</caption> and a good deal more", "", "2", "<caption>"]
    demos = [
        Demonstration(str(n), messages, text, images)
        for n, (text, (messages, images)) in enumerate(
            zip(texts, [*prompts, prompts[0], ask("these?", (32, 64), (96, 32))], strict=True)
        )
    ]
    parts, numbers = [], []

    def step(budget: TokenBudget, layout: str) -> None:
        encoded, batching = encode(demos, processor), Batching(layout, budget, processor.pad_id)
        parts.append(len(batching.plan(engine.module.model, encoded, budget.tokens).micro_batches))
        numbers.append(update_sft(engine, encoded, budget, layout=layout, pad_id=processor.pad_id))

    compare(dtype, engine, step, both(150, 1))
    assert parts == [1, 3, 5, 1, 2, 5]
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    assert [n["sft/loss"] for n in numbers] == [pytest.approx(numbers[0]["sft/loss"], rel=relative)] * 6
    assert len({n["sft/tokens"] for n in numbers}) == 1 and numbers[3]["sft/packing_error"] > 0


def test_packed_demonstrations_are_ordinary_sequences(processor, prompts):
    """No segment sees another one, and no token is computed twice or padded."""
    demos = [Demonstration("1", messages, "1 2", images) for messages, images in prompts]
    encoded = encode(demos, processor)
    model = build_tiny_policy(processor, SIZE, seed=1)
    use_layout("shared_prefix", model)
    (row,) = plan_batches("shared_prefix", model.model, encoded, WHOLE, pad_id=processor.pad_id).micro_batches
    lengths = [len(group.prompt.input_ids) + len(group.branches[0]) for group in encoded]
    assert sorted(row.layout.cu_branch.diff().tolist()) == sorted(lengths) and row.tokens == sum(lengths)
    assert row.layout.branch_prefix.tolist() == [-1] * 3 and row.layout.prefix_start.numel() == 0
    assert longest_item("shared_prefix", encoded) == max(lengths)
    assert response_tokens(encoded) == len(row.predict.target)


def spans(generator, *lengths: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(torch.randint(0, 200, (n,), generator=generator).tolist()) for n in lengths)


def groups_of(processor, prompts, generator, columns: int) -> list[ScoredGroup]:
    """Three groups: one with a tie and an invalid student, one of long spans, one without a valid student."""
    encoded = [processor.encode_prompt(*prompt) for prompt in prompts]
    short, long = (3, 5)[:columns], (17, 9)[:columns]
    first, second, third = (spans(generator, *short) for _ in range(3))
    return [
        ScoredGroup(encoded[0], first, [second, None, (first[0], *third[1:])]),
        ScoredGroup(encoded[1], spans(generator, *long), [spans(generator, *long)]),
        ScoredGroup(encoded[2], spans(generator, *short), [None, None]),
    ]


def padded_tokens(groups: list[ScoredGroup]) -> list[int]:
    return [sum(len(group.prompt.input_ids) + len(span) for span in group.spans()) for group in groups]


def options_of(processor, **changed) -> dict:
    options = {"pad_id": processor.pad_id, "semantics": "prism_fast"}
    return options | {"score_clip": 10.0, "score_reg": 0.001} | changed


@pytest.mark.parametrize("columns", [2, 1], ids=["spans", "response"])
@pytest.mark.parametrize(
    "changed",
    [{"aux_coef": 0.0}, {"aux_coef": 0.5}, {"length_penalty": 0.3, "spread": 0.2}],
    ids=["alignment", "warm-up", "shaped"],
)
def test_discriminator(processor, prompts, dtype, generator, columns, changed):
    engine = engine_of(build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3, head_std=0.2), dtype)
    groups = groups_of(processor, prompts, generator, columns)
    options = options_of(processor, **changed)
    tokens = padded_tokens(groups)
    cuts = [2 * sorted(tokens)[1], 1]
    assert [len(by_tokens(tokens, cut)) for cut in (WHOLE, *cuts)] == [1, 2, 3]
    found = {}

    def step(budget: TokenBudget, layout: str) -> None:
        found[layout, budget.tokens] = discriminate(engine, groups, budget, learn=True, layout=layout, **options)

    compare(dtype, engine, step, both(*cuts))
    whole = found["padded", WHOLE]
    once = sum(len(g.prompt.input_ids) + sum(map(len, g.spans())) for g in groups)
    assert found["shared_prefix", WHOLE].tokens == once < whole.tokens
    cut = [n for n, group in zip(tokens, groups, strict=True) if len(group.spans()) > 1]
    assert found["shared_prefix", 1].tokens == whole.tokens and found["shared_prefix", 1].repeated == sum(cut)
    for scores in found.values():
        torch.testing.assert_close(scores.student, whole.student, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(scores.teacher, whole.teacher, rtol=2e-6, atol=1e-6)
        assert scores.loss == pytest.approx(whole.loss, rel=1e-12 if dtype == torch.float64 else 1e-5, abs=1e-7)


def test_shaped_scores(processor, prompts, generator):
    """A penalty for length acts on rewards and loss alike, a weight of the spread on the loss alone."""
    model = build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3, head_std=0.2)
    engine, groups, found = engine_of(model, torch.float64), groups_of(processor, prompts, generator, 2), []
    use_layout("padded", engine.module.backbone)
    shapes = ({}, {"length_penalty": 0.3}, {"spread": 0.2})
    with Float64Islands():
        for shape in shapes:
            options = options_of(processor, layout="padded", **shape)
            found.append(discriminate(engine, groups, TokenBudget(WHOLE, notify=pytest.fail), learn=False, **options))
    plain, shorter, same = found
    for side, texts in (("teacher", [g.teacher for g in groups]), ("student", [s for g in groups for s in g.students])):
        tokens = torch.tensor([[len(span) for span in text or ((), ())] for text in texts])
        expected = getattr(plain, side) - 0.3 * tokens.log1p()
        torch.testing.assert_close(getattr(shorter, side), expected, rtol=1e-6, atol=1e-6)
        if side == "student":
            valid = [s is not None for g in groups for s in g.students]
            mean = (0.3 * tokens.log1p())[valid].mean(0)
            names = ("disc/length_penalty_caption", "disc/length_penalty_reasoning")
            assert [shorter.metrics[name] for name in names] == pytest.approx(mean.tolist(), rel=1e-6)
    assert "disc/length_penalty_caption" not in plain.metrics
    group, valid = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([True, False, True, True, False, False])
    counts = {"denominator": 3, "l2_denominator": 12}
    direct = [discriminator_loss(x.teacher, x.student, group, valid, **counts)[0] for x in (plain, shorter)]
    assert plain.loss == pytest.approx(float(direct[0]), rel=1e-6) != shorter.loss
    # The penalised scores of invalid responses are 0 here and there: their squares count alike.
    assert shorter.loss == pytest.approx(float(direct[1]), rel=1e-6)
    assert torch.equal(same.student, plain.student)
    spread = discriminator_loss(plain.teacher, plain.student, group, valid, spread=0.2, **counts)[0] - direct[0]
    assert same.loss - plain.loss == pytest.approx(float(spread), rel=1e-5) and float(spread) > 0


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_held_out_scores(processor, prompts, generator, layout):
    engine = engine_of(
        build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3, head_std=0.2), torch.float64
    )
    groups = groups_of(processor, prompts, generator, 2)
    options = options_of(processor, layout=layout)
    use_layout(layout, engine.module.backbone)
    with Float64Islands():
        whole, cut = (
            discriminate(engine, groups, TokenBudget(tokens, notify=pytest.fail), learn=False, **options)
            for tokens in (WHOLE, 1)
        )
    torch.testing.assert_close(cut.student, whole.student, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(cut.teacher, whole.teacher, rtol=1e-12, atol=1e-13)
    assert whole.loss == pytest.approx(cut.loss, rel=1e-12)
    assert (whole.tokens == cut.tokens) == (layout == "padded") and whole.repeated == cut.repeated == 0
    assert all(p.grad is None for p in engine.module.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_policy(processor, prompts, dtype, generator, preset):
    engine = engine_of(build_tiny_policy(processor, SIZE, seed=4), dtype)
    encoded = [processor.encode_prompt(*prompt) for prompt in prompts]
    lengths = [3, 1, 7, 12, 2, 5]
    completions = [Completion(ids, (-5.0,) * len(ids), 1.0, "stop") for ids in spans(generator, *lengths)]
    # The row without advantage is left out but counts in the denominator; one row is of earlier weights.
    advantage = torch.tensor([0.5, -1.0, 0.0, 2.0, -0.3, 0.7])
    batch = PolicyBatch(encoded, [0, 0, 0, 1, 1, 2], completions, advantage, [False, True, False, False, False, False])
    numbers = []

    def step(budget: TokenBudget, layout: str) -> None:
        options = policy_options(preset, max_response=20)
        shared = {"pad_id": processor.pad_id, "layout": layout}
        numbers.append(update_policy(engine, batch, options, temperature=0.8, budget=budget, **shared))

    compare(dtype, engine, step, both(130, 1))
    assert [n["policy/rows"] for n in numbers] == [5] * 6
    once = sum(len(prompt.input_ids) for prompt in encoded) + sum(lengths) - lengths[2]
    assert numbers[3]["policy/tokens"] == once < numbers[0]["policy/tokens"]
    assert numbers[0]["policy/loss"] == pytest.approx(
        numbers[2]["policy/loss"], rel=1e-12 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("aux_coef", [0.0, 0.5])
def test_what_stands_in_the_padding_does_not_matter(processor, prompts, generator, aux_coef):
    engine = engine_of(build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3), torch.float32)
    groups = groups_of(processor, prompts, generator, 2)
    found = []
    for pad_id in (processor.pad_id, 7):
        engine.discard()
        budget = TokenBudget(WHOLE, notify=pytest.fail)
        options = options_of(processor, pad_id=pad_id, aux_coef=aux_coef, layout="padded")
        scores = discriminate(engine, groups, budget, learn=True, **options)
        gradients = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
        found.append([scores.student, torch.tensor(scores.loss), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_out_of_memory_repeats_the_discriminators_step_in_smaller_pieces(processor, prompts, generator):
    engine = engine_of(build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3), torch.float32)
    groups = groups_of(processor, prompts, generator, 2)
    tokens = padded_tokens(groups)
    options, notes, calls = options_of(processor, aux_coef=0.5, layout="padded"), [], []

    def gradients(budget: TokenBudget) -> list[Tensor]:
        engine.discard()
        discriminate(engine, groups, budget, learn=True, **options)
        return [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]

    backward = engine.backward
    longest = max(tokens)
    assert [len(by_tokens(tokens, budget)) for budget in (2 * longest, longest)] == [2, 3]
    wanted = gradients(TokenBudget(longest, notify=pytest.fail))

    def failing(loss: Tensor, **made_of: Tensor) -> None:
        backward(loss, **made_of)
        calls.append(loss)
        if len(calls) == 2:  # with the gradients of two micro-batches already there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine.backward = failing
    budget = TokenBudget(2 * longest, notify=notes.append)
    found = gradients(budget)
    assert budget.tokens == longest and len(notes) == 1 and len(calls) == 2 + 3
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("semantics", "first"), [("released", True), ("prism_fast", False)])
def test_rewards_beyond_the_clamp_are_ordered_by_length_as_published_alone(processor, prompts, semantics, first):
    model = build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3, head_std=40.0)
    engine, groups, found = engine_of(model, torch.float64), groups_of(processor, prompts, torch.Generator(), 2), []
    use_layout("padded", engine.module.backbone)
    with Float64Islands():
        for shape in ({}, {"length_penalty": 0.3}):
            options = options_of(processor, layout="padded", **shape) | {"semantics": semantics, "score_clip": 5.0}
            found.append(discriminate(engine, groups, TokenBudget(WHOLE, notify=pytest.fail), learn=False, **options))
    plain, shorter = found
    assert (plain.teacher.abs() > 5).any()
    tokens = torch.tensor([[len(span) for span in group.teacher] for group in groups])
    scores = plain.teacher.clamp(-5, 5) if first else plain.teacher
    expected = scores - 0.3 * tokens.log1p()
    expected = expected.clamp(-5, 5) if first else expected
    torch.testing.assert_close(shorter.teacher, expected, rtol=1e-6, atol=1e-6)
