"""Gradients formed inside the forward: cut anywhere, or at sequence borders, they equal the composed ops' gradients."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import linear_logprob, linear_policy_loss, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES
from prism_fast.ops.reference.linear_logprob import BLOCK_BYTES
from prism_fast.ops.reference.softmax_rows import CHUNK_BYTES
from prism_fast.ops.waves import cuts

LENGTHS = (9, 0, 4, 11, 1)
PADDING = 3
N, H, V, B = sum(LENGTHS) + PADDING, 6, 19, len(LENGTHS)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


@pytest.fixture
def small_waves(monkeypatch):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr("prism_fast.ops.reference.linear_logprob.MIN_BLOCK_ROWS", 5)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 400)  # two rows


def inputs(generator):
    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    operands = [noise(*shape).requires_grad_() for shape in ((N, H), (V, H), (V,))]
    target = torch.randint(0, V, (N,), generator=generator)
    target[2] = -100
    return operands, target, noise(B), noise(N) * 0.3 - 3, noise(N) - 3


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_waves_equal_the_composition(loss, on_policy, generator, small_waves):
    (hidden, weight, bias), target, advantage, old_logp, ref_logp = inputs(generator)
    mask = torch.rand(N, generator=generator) > 0.2
    temperature = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    options = {
        "loss": loss,
        "old_logp": None if on_policy else old_logp,
        "ref_logp": ref_logp,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "norm_length": 10.0 if loss == "dr_grpo" else None,
        "mask": mask,
    }
    head = {"bias": bias, "temperature": temperature, "softcap": 5.0}
    found, stats = linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, **head, **options)
    gradients = torch.autograd.grad(found * 1.5, (hidden, weight, bias))
    parts = linear_logprob(hidden, weight, target, entropy=True, **head)
    options["mask"] = mask & (target >= 0)
    wanted, wanted_stats = policy_loss(parts.logp, advantage, CU_SEQLENS, entropy=parts.entropy, **options)
    torch.testing.assert_close([found, *stats], [wanted, *wanted_stats], rtol=1e-12, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(wanted * 1.5, (hidden, weight, bias)), rtol=1e-11, atol=1e-14
    )


def test_each_row_is_scored_once_with_gradients_and_without(generator, small_waves, monkeypatch):
    from prism_fast.ops.reference import linear_logprob as module

    rows = []
    real = module._product
    monkeypatch.setattr(module, "_product", lambda x, *rest: rows.append(x.shape[0]) or real(x, *rest))
    (hidden, weight, _), target, advantage, old_logp, _ = inputs(generator)
    linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp)[0].backward()
    assert rows == [5, 5, 5, 5, 5, 3]
    rows.clear()
    linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp, loss="gspo")[0].backward()
    assert rows == [9, 4, 11, 1, 3]  # whole sequences, then padding
    rows.clear()
    with torch.no_grad():
        linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp)
    assert sum(rows) == N


def test_one_wave_of_scores_serves_all(generator, small_waves, monkeypatch):
    from prism_fast.ops.reference import linear_logprob as module

    places = []
    real = module._product
    monkeypatch.setattr(module, "_product", lambda *x: places.append(x[-1].data_ptr()) or real(*x))
    (hidden, weight, _), target, advantage, old_logp, _ = inputs(generator)
    linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp)[0].backward()
    assert len(places) == 6 and len(set(places)) == 1
    places.clear()
    uneven = {"old_logp": old_logp, "loss": "gspo"}  # 9, 4, 11, 1 and 3 rows
    linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, **uneven)[0].backward()
    assert len(places) == 5 and len(set(places[2:])) == 1
    places.clear()
    found = linear_logprob(hidden, weight, target.clamp(min=0), save="recompute")
    assert len(places) == 6 and len(set(places)) == 1
    places.clear()
    found.logp.sum().backward()
    assert len(places) == 6 and len(set(places)) == 1


def test_backward_as_often_as_wanted(generator, small_waves):
    (hidden, weight, _), target, advantage, old_logp, _ = inputs(generator)
    loss, _ = linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert [x.data_ptr() for x in once] == [x.data_ptr() for x in again]  # the factor 1 costs no copy
    for factor in (1.0, 1.0, -0.5):
        (loss * factor).backward(retain_graph=True)
    torch.testing.assert_close([hidden.grad, weight.grad], [1.5 * x for x in once])
    assert torch.equal(torch.autograd.grad(loss, weight)[0], once[1])


def test_weight_grad_out_is_filled_by_the_call_and_backward_cannot_scale_it(generator, small_waves):
    (hidden, weight, _), target, advantage, old_logp, _ = inputs(generator)
    arguments = (hidden, weight, target, advantage, CU_SEQLENS)
    wanted = torch.autograd.grad(linear_policy_loss(*arguments, old_logp=old_logp)[0], (hidden, weight))
    start = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bank = start.clone()
    loss, _ = linear_policy_loss(*arguments, old_logp=old_logp, weight_grad_out=bank)
    torch.testing.assert_close(bank - start, wanted[1], rtol=1e-11, atol=1e-14)
    assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], wanted[0])
    assert torch.autograd.grad(loss * 2.0, hidden, retain_graph=True)[0].isnan().all()
    assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)
    bank.zero_()
    with torch.no_grad():
        linear_policy_loss(*arguments, old_logp=old_logp, weight_grad_out=bank)
    linear_policy_loss(hidden, weight.detach(), *arguments[2:], old_logp=old_logp, weight_grad_out=bank)
    assert not bank.any()


def test_frozen_operands(generator, small_waves):
    (hidden, weight, bias), target, advantage, old_logp, _ = inputs(generator)
    whole = linear_policy_loss(hidden, weight, target, advantage, CU_SEQLENS, bias=bias, old_logp=old_logp)[0]
    wanted = torch.autograd.grad(whole, (hidden, weight, bias))
    for learns in range(3):
        operands = [x if i == learns else x.detach() for i, x in enumerate((hidden, weight, bias))]
        loss, _ = linear_policy_loss(*operands[:2], target, advantage, CU_SEQLENS, bias=operands[2], old_logp=old_logp)
        torch.testing.assert_close(torch.autograd.grad(loss, operands[learns])[0], wanted[learns])


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_nothing_to_learn_from(loss, generator):
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    offsets, advantage = torch.tensor([0, 4], dtype=torch.int32), torch.ones(1)
    all_masked, _ = linear_policy_loss(
        hidden, weight, torch.full((4,), -100), advantage, offsets, old_logp=torch.zeros(4), loss=loss
    )
    all_masked.backward()
    assert all_masked == 0 and not hidden.grad.any() and not weight.grad.any()
    empty, stats = linear_policy_loss(
        hidden[:0],
        weight,
        torch.zeros(0, dtype=torch.int64),
        advantage,
        offsets * 0,
        old_logp=torch.zeros(0),
        loss=loss,
    )
    empty.backward()
    assert empty == 0 and stats.tokens == 0


def test_cuts():
    assert cuts(7, 3, None) == [(0, 3), (3, 6), (6, 7)]
    assert cuts(0, 3, None) == cuts(0, 3, [0]) == cuts(0, 3, [0, 0]) == []
    assert cuts(10, 4, [0, 1, 3, 8, 10]) == [(0, 3), (3, 8), (8, 10)]
    assert cuts(10, 4, [0, 9, 9, 10]) == [(0, 9), (9, 10)]
    assert cuts(10, 4, [0, 2, 2, 4]) == [(0, 4), (4, 8), (8, 10)]  # six rows of padding
    for borders in ([0, 3, 3, 4, 20, 21], [2, 5, 9], [0]):
        waves = cuts(25, 6, borders)
        assert [i for a, b in waves for i in range(a, b)] == list(range(waves[0][0], 25))
        assert not any(a < border < b and b - a > 6 for a, b in waves for border in borders)


def test_borders_are_checked(generator):
    (hidden, weight, _), target, advantage, old_logp, _ = inputs(generator)
    for borders in ([0, 9], [0, 9, 9, 13, 24, 99], [0, 9, 8, 13, 24, 25]):
        with pytest.raises(ValueError, match="linear_policy_loss: borders must be the 6 ascending offsets"):
            linear_policy_loss(
                hidden, weight, target, advantage, CU_SEQLENS, old_logp=old_logp, loss="gspo", borders=borders
            )
