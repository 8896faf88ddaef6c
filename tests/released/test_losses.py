"""The published loss of the discriminator against the reference vectors."""

from __future__ import annotations

import math

import pytest
import torch

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.scored import as_scored
from prism_fast.ops import native
from tests.ops.golden import DTYPES, load

VECTORS = load("discriminator_loss")


def released_batch(case: dict, micro_batch: list[int]) -> dict:
    """Scores (with gradient) and arguments of one micro-batch of a published case."""
    dtype = DTYPES[case["dtype"]]
    pick = torch.tensor(micro_batch)

    def pair(who: str, table: str, kind: torch.dtype) -> torch.Tensor:
        columns = [torch.tensor(case[table][f"{who}_{what}"], dtype=kind)[pick] for what in ("caption", "cot")]
        return torch.stack(columns, 1)

    beta = case["length_correction_beta"]
    return {
        "teacher": pair("teacher", "scores", dtype).requires_grad_(),
        "student": pair("student", "scores", dtype).requires_grad_(),
        "group": torch.arange(len(micro_batch)),
        "valid": torch.tensor(case["format_valid"])[pick],
        "semantics": "released",
        "score_clip": case["score_clip"],
        "score_reg": case["score_reg_coef"],
        "lengths": (pair("teacher", "lengths", torch.int64), pair("student", "lengths", torch.int64)),
        "length_penalty": 0.0 if beta is None else beta,
    }


@pytest.mark.parametrize("case", VECTORS["mm_gad_cases"], ids=lambda case: case["name"])
def test_released_vectors(case):
    tolerance = 1e-9 if case["dtype"] == "float64" else 2e-5
    parts = case["micro_batches"]
    metrics = case["metrics_per_micro_batch"]
    for number, micro_batch in enumerate(parts):
        arguments = released_batch(case, micro_batch)
        loss, stats = discriminator_loss(**arguments)
        by_size = case["loss_scale"].startswith("len")
        scale = len(micro_batch) / case["mini_batch_size"] if by_size else 1 / len(parts)
        (loss * scale).backward()
        assert (loss * scale).item() == pytest.approx(metrics["critic/d_loss"][number], rel=tolerance, abs=tolerance)
        for who in ("teacher", "student"):
            columns = [case["grad_scores"][f"{who}_{what}"] for what in ("caption", "cot")]
            wanted = torch.tensor(columns, dtype=torch.float64).T
            torch.testing.assert_close(
                arguments[who].grad.double(), wanted[torch.tensor(micro_batch)], rtol=tolerance, atol=tolerance
            )
        if int(stats.pairs[0]):
            valid, clip = arguments["valid"], arguments["score_clip"]
            for column, what in enumerate(("cap", "cot")):
                best, other = (
                    as_scored(arguments[who].detach(), length, arguments["length_penalty"], None)[valid, column]
                    for who, length in zip(("teacher", "student"), arguments["lengths"], strict=True)
                )
                held = (x if clip is None else x.clamp(-clip, clip) for x in (best, other))
                published = float(torch.gt(*held).double().mean())  # after the clamp, where what is ahead may be equal
                assert published == pytest.approx(metrics[f"critic/{what}_acc"][number], abs=1e-6)
                assert float(stats.accuracy[column]) == pytest.approx(float((best > other).double().mean()))
        else:  # published: a placeholder of 0.92
            assert stats.accuracy.isnan().all() and metrics["critic/d_acc"][number] == 0.92


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_scores_are_clamped_before_the_length_penalty_and_after_it(backend):
    """The published vectors have no case with both. Both sides of one pair, in float64: 13.1687 becomes 10 - 0.52,
    -9.9 - 0.52 becomes -10; a score that the first clamp changed has no gradient."""
    if backend == "native" and not native.available():
        pytest.skip("the native module is not built")
    teacher = torch.tensor([[13.1687, 3.0]], dtype=torch.float64, requires_grad=True)
    student = torch.tensor([[-9.9, 10.2]], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[7, 7]])
    loss, stats = discriminator_loss(
        teacher,
        student,
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.bool),
        semantics="released",
        score_clip=10.0,
        score_reg=0.001,
        lengths=(tokens, tokens),
        length_penalty=0.25,
        backend=backend,
    )
    penalty = 0.25 * math.log(8.0)
    best, other = (10.0 - penalty, 3.0 - penalty), (-10.0, 10.0 - penalty)
    wanted = sum(math.log1p(math.exp(s - t)) for t, s in zip(best, other, strict=True))
    wanted += 0.001 * sum(x * x for x in (*best, *other)) / 4
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert stats.teacher.tolist() == pytest.approx(best) and stats.student.tolist() == pytest.approx(other)
    loss.backward()
    share = 1 / (1 + math.exp(best[1] - other[1]))
    assert teacher.grad.tolist()[0] == pytest.approx([0.0, -share + 0.0005 * best[1]])
    assert student.grad.tolist() == [[0.0, 0.0]]
