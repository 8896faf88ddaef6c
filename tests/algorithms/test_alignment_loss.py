"""The discriminator's loss against the reference vectors, and what its repaired form promises."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.ops import pairwise_loss
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
            for column, what in enumerate(("cap", "cot")):
                assert float(stats.accuracy[column]) == pytest.approx(metrics[f"critic/{what}_acc"][number], abs=1e-6)
        else:  # published: a placeholder of 0.92
            assert stats.accuracy.isnan().all() and metrics["critic/d_acc"][number] == 0.92


@pytest.mark.parametrize("case", VECTORS["gad_cases"], ids=lambda case: case["dtype"])
def test_whole_response_vectors(case):
    dtype = DTYPES[case["dtype"]]
    student = torch.tensor(case["student_vpreds"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(case["teacher_vpreds"], dtype=dtype, requires_grad=True)
    own, other = torch.tensor(case["response_mask"]), torch.tensor(case["teacher_response_mask"])
    loss, _ = pairwise_loss(
        (teacher * other).sum(1, keepdim=True), (student * own).sum(1, keepdim=True), torch.arange(student.shape[0])
    )
    loss.backward()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
    for found, name in ((student.grad, "grad_student"), (teacher.grad, "grad_teacher")):
        torch.testing.assert_close(found, torch.tensor(case[name], dtype=dtype), rtol=tolerance, atol=tolerance)
