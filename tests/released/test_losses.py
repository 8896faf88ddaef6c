"""The published loss of the discriminator against the reference vectors."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.scored import as_scored
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
