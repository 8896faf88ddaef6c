"""The discriminator's loss against the reference vectors, and what its repaired form promises."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.ops import pairwise_loss
from tests.ops.golden import DTYPES, load

VECTORS = load("discriminator_loss")


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


def scores(generator, groups=3, rows=9):
    return (
        torch.randn(groups, 2, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(rows, 2, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.arange(rows) % groups,
        torch.rand(rows, generator=generator) > 0.4,
    )


def test_repaired_form_does_not_depend_on_micro_batches_and_the_released_one_does(generator):
    teacher, student, group, valid = scores(generator)
    valid[:3] = torch.tensor([True, False, False])
    count, squares = float(valid.sum()), float(2 * (3 + 9))
    whole, _ = discriminator_loss(teacher, student, group, valid)
    pieces, released = 0.0, 0.0
    for g in range(3):
        mine = group == g
        part = (teacher[g : g + 1], student[mine], torch.zeros(3, dtype=torch.int64), valid[mine])
        pieces = pieces + discriminator_loss(*part, denominator=count, l2_denominator=squares)[0]
        released = released + discriminator_loss(*part, semantics="released")[0] / 3
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    assert (
        abs(released.item() - discriminator_loss(teacher, student, group, valid, semantics="released")[0].item()) > 1e-3
    )


def test_no_valid_response_teaches_nothing_unless_released(generator):
    teacher, student, group, valid = scores(generator)
    nobody = torch.zeros_like(valid)
    repaired, stats = discriminator_loss(teacher, student, group, nobody, score_reg=0.0)
    assert repaired.item() == 0.0 and stats.pairs.tolist() == [0, 0] and stats.accuracy.isnan().all()
    gradient = torch.autograd.grad(repaired, (teacher, student))
    assert not gradient[0].any() and not gradient[1].any()
    released, _ = discriminator_loss(teacher, student, group, nobody, score_reg=0.0, semantics="released")
    wanted = 0.01 * torch.nn.functional.softplus(-teacher.clamp(-10, 10)[group].mean(0)).sum()
    torch.testing.assert_close(released, wanted, rtol=1e-12, atol=0)
    # Other ranks have valid samples: an empty rank then adds nothing.
    elsewhere, _ = discriminator_loss(
        teacher, student, group, nobody, score_reg=0.0, semantics="released", valid_everywhere=torch.tensor(2)
    )
    assert elsewhere.item() == 0.0


def test_released_replaces_bad_scores_by_zero_and_the_repaired_form_shows_them(generator):
    teacher, student, group, valid = scores(generator)
    valid[0] = True
    with torch.no_grad():
        student[0, 0] = float("nan")
    zeroed = student.detach().clone()
    zeroed[0, 0] = 0.0
    found, _ = discriminator_loss(teacher, student, group, valid, semantics="released")
    wanted, _ = discriminator_loss(teacher, zeroed, group, valid, semantics="released")
    assert torch.equal(found, wanted)
    assert discriminator_loss(teacher, student, group, valid)[0].isnan()


def test_refusals(generator):
    arguments = scores(generator)
    with pytest.raises(ValueError, match="semantics='compat' is not one of 'released'"):
        discriminator_loss(*arguments, semantics="compat")
    for option in ({"denominator": 3.0}, {"l2_denominator": 3.0}, {"spread": 0.1}):
        with pytest.raises(ValueError, match="'released' divides by the counts of its micro-batch"):
            discriminator_loss(*arguments, semantics="released", **option)
    with pytest.raises(ValueError, match="valid_everywhere belongs to 'released'"):
        discriminator_loss(*arguments, valid_everywhere=torch.tensor(1))


@pytest.mark.parametrize("semantics", ["released", "paper", "prism_fast"])
def test_empty_batch(semantics):
    teacher, student = (torch.zeros(0, 2, requires_grad=True) for _ in range(2))
    loss, _ = discriminator_loss(
        teacher, student, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), semantics=semantics
    )
    loss.backward()
    assert loss.item() == 0.0
