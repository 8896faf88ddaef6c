"""Which experts the spans go to: counts of the forward itself, the same however a step is laid out."""

from __future__ import annotations

import math

import pytest
import torch

from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.experts import SparseBlock
from prism_fast.models.policy import build_tiny_policy
from prism_fast.track.metrics import Metrics
from prism_fast.train.expert_shares import SHOWN, ExpertShares, span_information
from prism_fast.train.layouts import use_layout
from tests.support.float64 import Float64Islands
from tests.support.trainers import score_and_learn
from tests.train.test_score_rows import SIZE, WHOLE, discriminator, groups  # noqa: F401
from tests.train.test_score_rows import step as learn


def test_information_is_that_of_the_joint_distribution(generator):
    counts = torch.randint(1, 50, (5, 3, 6), generator=generator)
    shares = counts / counts.sum(-1, keepdim=True, dtype=torch.float64)
    for found, table in zip(span_information(counts), shares, strict=True):
        joint = table / 3  # kinds equally likely
        expected = sum(
            float(p) * math.log2(float(p) / (float(joint[k].sum()) * float(joint[:, e].sum())))
            for k, row in enumerate(joint)
            for e, p in enumerate(row)
        )
        assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [([[3, 3, 0, 0], [0, 0, 5, 5]], 1.0), ([[2, 1], [20, 10]], 0.0), ([[7, 0], [7, 0]], 0.0), ([[4], [9]], 0.0)],
)
def test_information_of_plain_cases(counts, bits):
    assert float(span_information(torch.tensor(counts))) == pytest.approx(bits, abs=1e-15)


SPANS = ("caption", "reasoning")


def read(shares: ExpertShares) -> dict[str, float]:
    metrics = Metrics()
    shares.add_to(metrics, "")
    return metrics.read()


def choose(generator, layers: int, tokens: int, experts: int, top_k: int = 2) -> list[torch.Tensor]:
    return [torch.rand(tokens, experts, generator=generator).topk(top_k).indices for _ in range(layers)]


@pytest.mark.parametrize(("columns", "kinds"), [(2, ("prompt", "caption", "reasoning")), (1, ("prompt", "response"))])
def test_numbers_equal_a_plain_count(generator, columns, kinds):
    choices = choose(generator, 3, 40, 4)
    branch = torch.randint(-1, 4, (40,), generator=generator)
    weight = torch.randint(0, 3, (40,), generator=generator)
    column = [k % columns for k in (0, 1, 1, 0)]
    shares = ExpertShares(kinds[1:], 4)
    for part in (slice(0, 25), slice(25, 40)):  # two forwards
        shares.add([c[part] for c in choices], column, branch[part], weight[part])
    wanted = torch.zeros(3, len(kinds), 4)
    for layer, chosen in enumerate(choices):
        for t in range(40):
            kind = 0 if branch[t] < 0 else 1 + column[branch[t]]
            for e in chosen[t]:
                wanted[layer, kind, e] += weight[t]
    assert torch.equal(shares.counts, wanted.long())
    numbers, table = read(shares), wanted.double() / wanted.sum(-1, keepdim=True)
    for k, kind in enumerate(kinds):
        for e in range(4):
            assert numbers[f"experts_{kind}_{e}"] == pytest.approx(float(table[:, k, e].mean()), rel=1e-12)
    assert ("expert_span_information" in numbers) == (columns == 2)
    if columns == 2:
        bits = span_information(wanted[:, 1:])
        top = int(numbers["expert_span_layer_top"]) - 1
        assert numbers["expert_span_information"] == pytest.approx(float(bits.mean()), rel=1e-12)
        assert numbers["expert_span_information_top"] == float(bits[top]) == float(bits.max())
        assert numbers["experts_top_reasoning_2"] == pytest.approx(float(table[top, 2, 2]), rel=1e-12)


def test_what_is_not_there_has_no_metric(generator):
    assert read(ExpertShares(SPANS, 4)) == {}
    captions = ExpertShares(SPANS, 4)
    captions.add(choose(generator, 2, 9, 4), [0, 0], torch.randint(-1, 2, (9,), generator=generator), torch.ones(9))
    found = read(captions)
    assert found and not any("reasoning" in key or "information" in key for key in found)
    many = ExpertShares(SPANS, SHOWN + 1)
    many.add(choose(generator, 2, 60, SHOWN + 1), [0, 1], torch.arange(60) % 3 - 1, torch.ones(60))
    assert list(read(many)) == ["expert_span_information", "expert_span_information_top", "expert_span_layer_top"]


@pytest.mark.parametrize("aux_coef", [0.0, 0.5])
def test_a_step_counts_alike_in_every_layout(processor, groups, aux_coef):  # noqa: F811
    model, found = discriminator(processor), []
    with Float64Islands():
        for layout, budget in (("padded", WHOLE), ("padded", 1), ("shared_prefix", WHOLE), ("shared_prefix", 1)):
            found.append(learn(model, groups, processor, layout, budget, aux_coef=aux_coef)[0].experts)
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 3 + 2 * 3 * 4
    assert 0 < found[0]["expert_span_information"] <= found[0]["expert_span_information_top"] <= 1
    assert found[0]["expert_span_layer_top"] in (1, 2), "the last layer routes scored rows alone"


def test_a_router_that_reads_the_kind_is_found(processor, groups):  # noqa: F811
    """Captions and reasonings of two tokens each, and a first layer that tells these tokens apart."""
    model = build_discriminator(build_tiny_policy(processor, SIZE, seed=2), seed=3).double()
    use_layout("shared_prefix", model.backbone)
    group = groups[0].__class__(groups[1].prompt, ((40, 40), (50, 50)), [((40,), (50,))])

    def gates(layer: SparseBlock, args: tuple) -> None:
        flat = args[0].reshape(-1, SIZE.hidden_size)
        caption = torch.zeros(len(flat), dtype=torch.bool)
        prompt = len(group.prompt.input_ids)
        caption[prompt : prompt + 2] = caption[prompt + 4] = True
        assert len(flat) == prompt + 6
        logits = torch.where(caption[:, None], torch.tensor([2.0, 1.0, 0, -1]), torch.tensor([-1.0, 0, 1.0, 2.0]))
        layer.gate.weight.data.copy_(torch.linalg.lstsq(flat.detach(), logits.double()).solution.T)

    block = model.backbone.language_model.layers[1].mlp
    block.register_forward_pre_hook(gates)
    options = {"score_clip": None, "score_reg": 0.0, "layout": "shared_prefix", "pad_id": processor.pad_id}
    scores = score_and_learn(model, [group], tokens=WHOLE, **options)
    assert scores.experts["expert_span_layer_top"] == 2
    assert scores.experts["expert_span_information_top"] == pytest.approx(1.0)
    top = {key: value for key, value in scores.experts.items() if key.startswith("experts_top_")}
    assert top["experts_top_caption_0"] == top["experts_top_reasoning_3"] == 0.5
    assert top["experts_top_caption_3"] == top["experts_top_reasoning_0"] == 0.0
