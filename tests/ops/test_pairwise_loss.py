"""pairwise_loss: formula, clamp, ties, counts, spread term, denominators and degenerate batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from prism_fast.ops import pairwise_loss


def batch(generator, groups=4, rows=13, columns=2, scale=2.0, dtype=torch.float64):
    """Arguments with gradient; some students do not count."""
    return {
        "teacher": (scale * torch.randn(groups, columns, generator=generator, dtype=dtype)).requires_grad_(),
        "student": (scale * torch.randn(rows, columns, generator=generator, dtype=dtype)).requires_grad_(),
        "group": torch.randint(0, groups, (rows,), generator=generator),
        "valid": torch.rand(rows, generator=generator) > 0.3,
    }


def gradients(loss, data):
    return torch.autograd.grad(loss, (data["teacher"], data["student"]))


def test_equals_the_formula(generator):
    data = batch(generator)
    lengths = (torch.randint(1, 50, (4, 2), generator=generator), torch.randint(1, 50, (13, 2), generator=generator))
    loss, stats = pairwise_loss(**data, clip=1.5, lengths=lengths, length_penalty=(0.5, 0.25), l2=0.01)
    rate = torch.tensor([0.5, 0.25], dtype=torch.float64)
    t = (data["teacher"] - rate * lengths[0].double().log1p()).clamp(-1.5, 1.5)
    s = (data["student"] - rate * lengths[1].double().log1p()).clamp(-1.5, 1.5)
    margin = (t[data["group"]] - s)[data["valid"]]
    wanted = -logsigmoid(margin).sum() / margin.shape[0] + 0.01 * (t.square().sum() + s.square().sum()) / (17 * 2)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, data), gradients(wanted, data), rtol=1e-11, atol=1e-14)
    assert stats.pairs.tolist() == [margin.shape[0]] * 2
    torch.testing.assert_close(stats.margin, margin.mean(0).detach())
    torch.testing.assert_close(stats.teacher - stats.student, stats.margin)
    ahead = (data["teacher"] - rate * lengths[0].double().log1p())[data["group"]] > (
        data["student"] - rate * lengths[1].double().log1p()
    )
    torch.testing.assert_close(stats.accuracy, ahead[data["valid"]].double().mean(0))
    torch.testing.assert_close(stats.loss.sum() + 0.01 * (t.square().sum() + s.square().sum()) / 34, loss)


def test_gradcheck(generator):
    data = batch(generator)
    teacher, student = data.pop("teacher"), data.pop("student")

    def run(teacher, student):
        return pairwise_loss(teacher, student, **data, clip=2.0, l2=0.1, spread=0.2)[0]

    assert torch.autograd.gradcheck(run, (teacher, student))


def test_clamp_has_full_gradient_on_its_bounds_and_none_outside():
    teacher = torch.tensor([[10.0], [10.5]], dtype=torch.float64, requires_grad=True)
    student = torch.tensor([[-10.0], [-11.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = pairwise_loss(teacher, student, torch.arange(2), clip=10.0)
    slope = -torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64)) / 2
    found = gradients(loss, {"teacher": teacher, "student": student})
    torch.testing.assert_close(found[0][:, 0], torch.stack((slope, slope * 0)))
    torch.testing.assert_close(found[1][:, 0], torch.stack((-slope, slope * 0)))


def test_a_teacher_row_serves_its_whole_group(generator):
    data = batch(generator)
    shared, stats = pairwise_loss(**data, clip=1.0)
    spread_out = data | {"teacher": data["teacher"][data["group"]], "group": torch.arange(13)}
    repeated, repeated_stats = pairwise_loss(**spread_out, clip=1.0)
    torch.testing.assert_close(shared, repeated, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(shared, data), gradients(repeated, data), rtol=1e-13, atol=1e-15)
    assert torch.equal(torch.stack(stats), torch.stack(repeated_stats))


def test_ties_are_counted_and_claim_no_accuracy():
    teacher = torch.tensor([[1.0, 2.0], [12.0, 0.0]])
    student = torch.tensor([[1.0, 3.0], [0.5, 2.0], [11.0, 0.0], [7.0, 7.0]])
    valid = torch.tensor([True, True, True, False])
    _, stats = pairwise_loss(teacher, student, torch.tensor([0, 0, 1, 1]), valid=valid, clip=10.0)
    assert stats.pairs.tolist() == [3, 3]
    # 12 against 11 becomes equal only by the clamp: it is ahead, and no tie.
    assert stats.ties.tolist() == [1, 2]
    assert stats.correct.tolist() == [2, 0]
    assert stats.accuracy.tolist() == [1.0, 0.0]
    _, same = pairwise_loss(teacher[:1], teacher[:1].repeat(3, 1), torch.zeros(3, dtype=torch.int64))
    assert same.ties.tolist() == [3, 3] and same.accuracy.isnan().all() and same.margin.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", ["reference", None])
def test_who_is_ahead_is_decided_before_the_clamp(backend):
    """Scores far beyond it, on either side; with a length penalty, the scores that it leaves."""
    teacher, group = torch.tensor([[50.0]]), torch.zeros(4, dtype=torch.int64)
    student = torch.tensor([[30.0], [10.0], [50.0], [70.0]])
    _, stats = pairwise_loss(teacher, student, group, clip=2.0, backend=backend)
    assert (stats.correct.item(), stats.ties.item(), stats.accuracy.item()) == (2, 1, pytest.approx(2 / 3))
    assert stats.margin.item() == 0.0  # that is of the scores in the loss
    lengths = (torch.tensor([[100]]), torch.tensor([[1], [100], [100], [10**6]]))
    _, stats = pairwise_loss(teacher, student, group, clip=2.0, lengths=lengths, length_penalty=5.0, backend=backend)
    assert (stats.correct.item(), stats.ties.item()) == (2 + 1, 1)  # 70 - 5 log(10^6) = 0.9 < 50 - 5 log(101) = 26.9


def test_identical_texts_give_log_two_and_a_balanced_gradient():
    score = torch.tensor([[0.7]], dtype=torch.float64)
    teacher, student = score.clone().requires_grad_(), score.clone().requires_grad_()
    loss, _ = pairwise_loss(teacher, student, torch.zeros(1, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert (teacher.grad.item(), student.grad.item()) == (-0.5, 0.5)


@pytest.mark.parametrize("semilarge", [1e3, 1e30])
def test_far_scores_stay_finite(semilarge):
    teacher = torch.tensor([[-semilarge]], requires_grad=True)
    student = torch.tensor([[semilarge]], requires_grad=True)
    loss, _ = pairwise_loss(teacher, student, torch.zeros(1, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(2 * semilarge) and teacher.grad.item() == -1.0


def test_micro_batches_with_global_denominators_add_up(generator):
    data = batch(generator, groups=6, rows=20)
    whole, _ = pairwise_loss(**data, clip=1.5, l2=0.01, spread=0.1)
    wanted = gradients(whole, data)
    total = [0.0, 0.0, 0.0]
    for members in ([0, 3], [1], [2, 4, 5]):  # a group is never split
        rows = torch.isin(data["group"], torch.tensor(members))
        local = torch.tensor([members.index(g) if g in members else 0 for g in range(6)])
        loss, _ = pairwise_loss(
            data["teacher"][members],
            data["student"][rows],
            local[data["group"][rows]],
            valid=data["valid"][rows],
            clip=1.5,
            l2=0.01,
            spread=0.1,
            denominator=data["valid"].sum(),
            l2_denominator=52.0,
        )
        parts = gradients(loss, data)
        total = [total[0] + loss.item(), total[1] + parts[0], total[2] + parts[1]]
    assert total[0] == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(tuple(total[1:]), wanted, rtol=1e-12, atol=1e-15)


def test_spread_term_equals_the_sorted_form(generator):
    data = batch(generator, groups=3, rows=17)
    data["group"][:4], data["valid"][:4] = 2, torch.tensor([True, False, True, True])
    with torch.no_grad():
        data["student"][0] = data["student"][2]  # equal scores share two ranks
    plain, _ = pairwise_loss(**data)
    spread, _ = pairwise_loss(**data, spread=0.3)
    wanted = 0.0
    for g in range(3):
        for k in range(2):
            r = data["student"][(data["group"] == g) & data["valid"], k].sort().values
            n = r.shape[0]
            if n > 1:
                level = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
                wanted = wanted + (r - (r.mean() + torch.special.ndtri(level))).square().sum()
    wanted = 0.3 * wanted / data["valid"].sum()
    torch.testing.assert_close(spread - plain, wanted, rtol=1e-11, atol=1e-13)
    found = torch.autograd.grad(spread - plain, data["student"])[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, data["student"])[0], rtol=1e-11, atol=1e-13)


def test_spread_of_the_target_itself_is_zero():
    level = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    student = (3.0 + torch.special.ndtri(level))[torch.randperm(8, generator=torch.Generator().manual_seed(1)), None]
    teacher, group = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    difference = pairwise_loss(teacher, student, group, spread=1.0)[0] - pairwise_loss(teacher, student, group)[0]
    assert abs(difference.item()) < 1e-12


def test_rows_that_do_not_count_have_gradient_zero_and_may_hold_nan(generator):
    data = batch(generator)
    bad = ~data["valid"]
    wanted = gradients(pairwise_loss(**data, clip=1.0, spread=0.1)[0], data)
    with torch.no_grad():
        data["student"][bad] = math.nan
    loss, stats = pairwise_loss(**data, clip=1.0, spread=0.1)
    found = gradients(loss, data)
    assert torch.equal(found[1][bad], torch.zeros(int(bad.sum()), 2, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.stack(stats).isfinite().all()


def test_unknown_group_is_nan_and_others_are_not_touched():
    teacher, student = torch.zeros(2, 1), torch.zeros(3, 1)
    loss, _ = pairwise_loss(teacher, student, torch.tensor([0, 1, 2]))
    assert loss.isnan()
    loss, _ = pairwise_loss(teacher, student, torch.tensor([0, 1, -1]), valid=torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("groups", "rows", "columns"), [(0, 0, 2), (3, 0, 2), (1, 1, 1), (2, 5, 0)])
@pytest.mark.parametrize("nobody", [False, True])
def test_degenerate_batches(groups, rows, columns, nobody, generator):
    teacher = torch.randn(groups, columns, generator=generator, requires_grad=True)
    student = torch.randn(rows, columns, generator=generator, requires_grad=True)
    valid = torch.zeros(rows, dtype=torch.bool) if nobody else None
    loss, stats = pairwise_loss(
        teacher, student, torch.zeros(rows, dtype=torch.int64), valid=valid, clip=10.0, spread=0.1
    )
    loss.backward()
    if nobody or rows == 0 or columns == 0:
        assert loss.item() == 0.0
        assert torch.equal(student.grad, torch.zeros_like(student))
        assert torch.equal(teacher.grad, torch.zeros_like(teacher))
        assert stats.accuracy.isnan().all()  # never a placeholder
    else:
        assert loss.item() > 0.0


def test_half_precision_scores_are_lifted(generator):
    data = batch(generator, dtype=torch.bfloat16)
    loss, _ = pairwise_loss(**data)
    lifted = {name: data[name].detach().float() for name in ("teacher", "student")}
    assert loss.dtype == torch.float32 and torch.equal(loss, pairwise_loss(**(data | lifted))[0])


REFUSALS = {
    r"teacher must have shape \[any, any\]": {"teacher": torch.zeros(2)},
    r"student must have shape \[any, 2\], got \[3, 1\]": {"student": torch.zeros(3, 1)},
    "student must be float32, got float64": {"student": torch.zeros(3, 2, dtype=torch.float64)},
    r"group must have shape \[3\]": {"group": torch.zeros(2, dtype=torch.int64)},
    "valid must be bool": {"valid": torch.ones(3)},
    "clip=0.0 must be": {"clip": 0.0},
    "length_penalty=0.5 needs lengths": {"length_penalty": 0.5},
    "length_penalty has 3 entries, there are 2 scores": {"length_penalty": [0.1, 0.2, 0.3]},
    "lengths must be the pair": {"lengths": torch.ones(3, 2)},
    r"lengths\[0\] must have shape \[2, 2\]": {"lengths": (torch.ones(3, 2), torch.ones(3, 2))},
    "l2=-1.0 must be": {"l2": -1.0},
    "spread=-1.0 must be": {"spread": -1.0},
    "denominator=-2.0 must be": {"denominator": -2.0},
    r"l2_denominator must have shape \[\]": {"l2_denominator": torch.ones(1)},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    arguments = {
        "teacher": torch.zeros(2, 2),
        "student": torch.zeros(3, 2),
        "group": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"pairwise_loss: {message}"):
        pairwise_loss(**(arguments | REFUSALS[message]))
