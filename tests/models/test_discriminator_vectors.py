"""Reference vectors of the published discriminator: scores, head outputs, one update with gradient norms, warm-up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prism_fast.models.discriminator import load_balance_loss, load_discriminator
from prism_fast.models.forward import TokenBatch, collate, hidden_states
from prism_fast.models.processor import Prompt

GOLDEN = Path(__file__).parents[1] / "golden"
V = json.loads((GOLDEN / "discriminator_scores.json").read_text())
PAD = 256
VALID = [0, 1, 3]


@pytest.fixture(scope="module")
def model():
    return load_discriminator(GOLDEN / "tiny_critic").eval()


def kept(values: list[int], mask: list[int]) -> tuple[int, ...]:
    return tuple(v for v, m in zip(values, mask, strict=True) if m)


def prompt(index: int) -> Prompt:
    ids = kept(V["prompt_ids"][index], V["prompt_mask"][index])
    return Prompt(ids, torch.tensor(V["pixel_values"][index]), torch.tensor([V["image_grid_thw"][index]]))


def text(ids) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def spans(index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Caption and reasoning tokens of a response; a malformed one is cut in half, as published."""
    ids = kept(V["responses"][index], V["response_mask"][index])
    match = re.match(
        r"^\s*(<caption>.*?</caption>)\s*(<think>.*?</think>\s*<answer>.*?</answer>)\s*$", text(ids), re.DOTALL
    )
    if match is None:
        assert index not in VALID
        border = max(1, len(ids) // 2)
    else:
        border = next(k for k in range(1, len(ids) + 1) if match[1] in text(ids[:k]))
    return ids[:border], ids[border:]


def rows(model, continuations, positions="text") -> TokenBatch:
    prompts = [prompt(i) for i in range(4)]
    return collate(
        prompts, range(4), continuations, model_config=model.backbone.config, pad_id=PAD, positions=positions
    )


CAPTIONS, REASONINGS = zip(*map(spans, range(4)), strict=True)
TEACHER_CAPTIONS = [kept(*x) for x in zip(V["teacher_caption_ids"], V["teacher_caption_mask"], strict=True)]
TEACHER_REASONINGS = [kept(*x) for x in zip(V["teacher_cot_ids"], V["teacher_cot_mask"], strict=True)]


def test_weights_are_read_from_the_released_layout(model):
    checksums = V["weights"]["checksums"]
    ours = {f"model.{name}": value for name, value in model.backbone.state_dict().items()}
    ours["v_head.1.weight"] = model.v_head[1].weight
    assert set(ours) == {name.removeprefix("base_model.") for name in checksums} - {"lm_head.weight"}
    for name, value in ours.items():
        assert value.double().abs().sum().item() == pytest.approx(checksums[name]["abs_sum"], rel=1e-6), name
        if ".experts." in name:
            assert list(value.transpose(1, 2).shape) == checksums[name]["shape"]


@pytest.mark.parametrize("precision", ["float32", "bf16_autocast"])
@pytest.mark.parametrize("kind", ["caption", "cot"])
def test_scores(model, precision, kind):
    expected = torch.tensor(V["expected_scores"][precision][f"{kind}_scores"])
    half = precision == "bf16_autocast"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        model.head_in_float32 = not half
        try:
            score = model(rows(model, CAPTIONS if kind == "caption" else REASONINGS)).score
        finally:
            model.head_in_float32 = True
    assert score.dtype == (torch.bfloat16 if half else torch.float32)
    assert (score.float() - expected)[VALID].abs().max() < (0.07 if half else 2e-5)


def test_scores_with_length_correction(model):
    lengths = torch.tensor([len(c) for c in CAPTIONS])
    with torch.no_grad():
        score = model(rows(model, CAPTIONS)).score - 0.5 * torch.log1p(lengths)
    expected = torch.tensor(V["expected_scores"]["float32"]["with_length_correction_0.5"]["caption_scores"])
    assert (score - expected)[VALID].abs().max() < 2e-5


def test_head_output_of_every_token(model):
    expected = V["expected_head_outputs_sample0_prompt_plus_caption"]
    assert len(CAPTIONS[0]) == expected["n_caption_tokens"]
    batch = collate([prompt(0)], [0], CAPTIONS[:1], model_config=model.backbone.config, pad_id=PAD, positions="text")
    with torch.no_grad():
        values = model.score_hidden(hidden_states(model.backbone, batch))[0]
    torch.testing.assert_close(values, torch.tensor(expected["values"]), rtol=0, atol=2e-5)


def test_update_metrics_and_gradient_norm_of_every_tensor(model):
    """Published loss of one micro-batch (no dropout): Bradley-Terry per span over the valid samples plus the score
    regulariser over all of them."""
    expected, metrics = V["expected_update"], V["expected_update"]["metrics"]
    model.zero_grad()
    student = [model(rows(model, r)).score.clamp(-10, 10) for r in (CAPTIONS, REASONINGS)]
    teacher = [model(rows(model, r)).score.clamp(-10, 10) for r in (TEACHER_CAPTIONS, TEACHER_REASONINGS)]
    losses = [-F.logsigmoid((t - s)[VALID]).mean() for t, s in zip(teacher, student, strict=True)]
    regulariser = V["score_reg_coef"] * torch.stack([x.square().mean() for x in (*student, *teacher)]).mean()
    loss = sum(losses) + regulariser
    loss.backward()
    assert loss.item() == pytest.approx(metrics["critic/d_loss"], rel=1e-5)
    assert losses[0].item() == pytest.approx(metrics["critic/cap_loss"], rel=1e-5)
    assert losses[1].item() == pytest.approx(metrics["critic/cot_loss"], rel=1e-5)
    assert regulariser.item() == pytest.approx(metrics["critic/score_reg_loss"], rel=1e-5)
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert total.item() == pytest.approx(metrics["critic/grad_norm"], rel=1e-5)
    ours = {f"model.{name}": p.grad for name, p in model.backbone.named_parameters()}
    ours["v_head.1.weight"] = model.v_head[1].weight.grad
    assert set(ours) == set(expected["grad_norms"])
    for name, grad in ours.items():
        assert grad.norm().item() == pytest.approx(expected["grad_norms"][name], rel=1e-4), name
    head = torch.tensor(expected["v_head_grad"])
    torch.testing.assert_close(ours["v_head.1.weight"].flatten(), head.flatten(), rtol=1e-4, atol=1e-5)


def published_last_index(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Which token of right-padded rows the published warm-up scores, in one half (all teachers or all students).

    Its rows are left-padded to ``width``, the longest of both halves. It looks at the first row alone: if that has no
    padding, it takes all rows for right-padded and reads position ``length - 1``, which in a left-padded row of length
    ``n`` is token ``2n - width - 1`` instead of ``n - 1``."""
    return 2 * lengths - width - 1 if int(lengths[0]) == width else lengths - 1


def test_published_index_is_wrong_exactly_when_the_first_row_is_the_longest():
    lengths = torch.tensor([10, 8, 7])
    assert published_last_index(lengths, 12).tolist() == [9, 7, 6]
    assert published_last_index(lengths, 10).tolist() == [9, 5, 3]


@pytest.mark.parametrize("case", V["warmup"], ids=lambda case: case["name"])
def test_warm_up_forward_with_the_published_choice_of_token(model, case):
    sequences = [kept(*x) for x in zip(case["input_ids"], case["attention_mask"], strict=True)]
    prompts = [
        Prompt(ids, torch.tensor(V["pixel_values"][i]), torch.tensor([V["image_grid_thw"][i]]))
        for ids, i in zip(sequences, case["image_index"], strict=True)
    ]
    batch = collate(prompts, range(4), [()] * 4, model_config=model.backbone.config, pad_id=PAD)
    width = len(case["input_ids"][0])
    last = torch.cat([published_last_index(half, width) for half in batch.lengths.split(2)])
    with torch.no_grad():
        released, ours = model(batch, last=last), model(batch)
    expected = torch.tensor(case["teacher_scores"] + case["student_scores"])
    torch.testing.assert_close(released.score, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.score, torch.tensor(case["end_of_row_scores"]), rtol=0, atol=2e-5)
    text_config = model.backbone.config.text_config
    balance = load_balance_loss(
        released.router_logits, text_config.num_experts, text_config.num_experts_per_tok, batch.attention_mask
    )
    pairwise = -F.logsigmoid(released.score[:2] - released.score[2:]).mean()
    assert balance.item() == pytest.approx(case["aux_loss"], rel=1e-5)
    assert pairwise.item() == pytest.approx(case["pairwise_loss"], rel=1e-4)
    assert (pairwise + 0.01 * balance).item() == pytest.approx(case["loss"], rel=1e-4)


def test_one_warm_up_case_shows_the_published_bug():
    wrong = [c["teacher_scores"] + c["student_scores"] != c["end_of_row_scores"] for c in V["warmup"]]
    assert sorted(wrong) == [False, True]
