"""linear_cross_entropy against torch's cross entropy and an explicit z-loss in float64, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from prism_fast.ops import bad_values, linear_cross_entropy, linear_logprob
from prism_fast.ops.reference import linear_logprob as reference

N, H, V = 21, 16, 37


def operands(generator, dtype=torch.float64, bias=True):
    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(0, V, (N,), generator=generator)
    target[3::5] = -100
    return noise(N, H), noise(V, H), noise(V) if bias else None, target


def formula(hidden, weight, bias, target, *, softcap=None, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    kept = target != -100
    squares = torch.where(kept, z.logsumexp(-1).square(), 0.0).sum()
    squares = squares / kept.sum() if reduction == "mean" else squares
    return cross_entropy(z, target, label_smoothing=label_smoothing, reduction=reduction) + z_loss * squares


CASES = (
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"z_loss": 0.3},
    {"z_loss": 0.02, "softcap": 3.0, "reduction": "sum"},
    {"label_smoothing": 0.2, "z_loss": 0.1, "reduction": "sum"},
    {"softcap": 2.0},
)


def compare(found, wanted, leaves, others, rtol, atol):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=atol)
    ours, theirs = torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, others)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_torch_in_float64(options, bias, generator, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr(reference, "MIN_BLOCK_ROWS", 8)
    x = operands(generator, bias=bias)
    leaves = [t for t in x[:3] if t is not None]
    found = linear_cross_entropy(x[0], x[1], x[3], bias=x[2], **options)
    assert found.dtype == torch.float64 and found.dim() == 0
    compare(found, formula(*x, **options), leaves, leaves, 1e-10, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES[2:6], ids=str)
def test_triton(options, dtype, generator, monkeypatch):
    pytest.importorskip("triton")
    from tests.support.triton_device import DEVICE

    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_UNIT", 8)
    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_BYTES", 1)
    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_BYTES_LARGE", 1)
    x = [t.detach().to(DEVICE).requires_grad_(t.is_floating_point()) for t in operands(generator, dtype)]
    doubles = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in x]
    found = linear_cross_entropy(x[0], x[1], x[3], bias=x[2], backend="triton", **options)
    size = 1e-4 if dtype == torch.float32 else 4e-2
    compare(found, formula(*doubles, **options), x[:3], doubles[:3], size, size)


def test_denominator_and_waves_of_a_step_add_up(generator):
    hidden, weight, bias, target = operands(generator)
    options = {"label_smoothing": 0.1, "z_loss": 0.05}
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, bias=bias, **options), (hidden, weight))
    count = (target != -100).sum()
    bank = torch.zeros_like(weight)
    rows = []
    for part in (slice(0, 9), slice(9, N)):
        x = hidden[part].detach().requires_grad_()
        loss = linear_cross_entropy(
            x, weight, target[part], bias=bias, denominator=count, weight_grad_out=bank, **options
        )
        loss.backward(retain_graph=True)
        rows.append(x.grad.clone())
    torch.testing.assert_close(torch.cat(rows), whole[0])
    torch.testing.assert_close(bank, whole[1])
    assert weight.grad is None
    loss.backward()  # nothing was used up
    assert not linear_cross_entropy(hidden[:2], weight, target[:2], denominator=0.0).isnan()


def test_scaled_losses_frozen_operands_and_half_precision(generator):
    hidden, weight, _, target = operands(generator)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    scaled = torch.autograd.grad(3.0 * linear_cross_entropy(hidden, weight, target), (hidden, weight))
    torch.testing.assert_close(scaled, tuple(3.0 * g for g in wanted))
    frozen = linear_cross_entropy(hidden, weight.detach(), target)
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], wanted[0])
    mixed = linear_cross_entropy(hidden.bfloat16(), weight.float(), target)
    gradient = torch.autograd.grad(mixed, weight)[0]
    assert mixed.dtype == torch.float32 and (gradient - wanted[1]).norm() < 2e-2 * wanted[1].norm()


def test_no_rows_ignored_rows_and_targets_outside(generator):
    hidden, weight, _, target = operands(generator)
    nothing = torch.full_like(target, -100)
    assert linear_cross_entropy(hidden, weight, nothing).isnan()
    loss = linear_cross_entropy(hidden, weight, nothing, reduction="sum", z_loss=1.0, label_smoothing=0.1)
    loss.backward()
    assert loss == 0.0 and not hidden.grad.any() and not weight.grad.any()
    assert linear_cross_entropy(hidden[:0], weight, target[:0], reduction="sum") == 0.0
    bad_values(hidden.device)
    target[0] = V
    loss = linear_cross_entropy(hidden, weight, target, z_loss=0.1)
    assert loss.isnan() and bad_values(hidden.device) == 1
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert gradient[0].isnan().all() and gradient[1:].isfinite().all()


@pytest.mark.parametrize("options", [CASES[0], CASES[6], CASES[5]], ids=str)
def test_under_a_compiler(options, generator):
    hidden, weight, bias, target = operands(generator)

    def run(h, w):
        return linear_cross_entropy(h, w, target, bias=bias, **options)

    found = torch.compile(run, backend="eager", fullgraph=True)(hidden, weight)
    compare(found, run(hidden, weight), (hidden, weight), (hidden, weight), 1e-9, 1e-11)


REFUSED = {
    "reduction='none' is not one of 'mean', 'sum'": {"reduction": "none"},
    "label_smoothing=1.5 must be": {"label_smoothing": 1.5},
    "z_loss=-1.0 must be": {"z_loss": -1.0},
    "reduction='sum' has no denominator": {"reduction": "sum", "denominator": 3.0},
    "ignore_index must be a whole number, got 1.5": {"ignore_index": 1.5},
    "ignore_index must be a whole number, got None": {"ignore_index": None},
    "denominator must have shape": {"denominator": torch.ones(2)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, generator):
    hidden, weight, _, target = operands(generator)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(hidden, weight, target, **REFUSED[message])
    with pytest.raises(NotImplementedError, match="label_smoothing=0.1 with softcap=2.0"):
        linear_cross_entropy(hidden, weight, target, softcap=2.0, label_smoothing=0.1)


def test_meta_tensors_are_refused_by_name():
    x = [torch.empty(shape, device="meta") for shape in ((3, 16), (5, 16))]
    for op in (linear_cross_entropy, linear_logprob):
        with pytest.raises(NotImplementedError, match=f"{op.__name__}: tensors on the device meta"):
            op(*x, torch.empty(3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_overflow_in_float16_of_a_loss_that_is_not_used(backend):
    """Gradients are formed before the gradient from above is known: infinite times 0 is 0 here."""
    device = "cpu"
    if backend == "triton":
        pytest.importorskip("triton")
        from tests.support.triton_device import DEVICE as device
    hidden, weight = (torch.full((n, 16), 30.0, dtype=torch.float16, device=device).requires_grad_() for n in (2, 5))
    target = torch.tensor([0, 1], device=device)
    loss = linear_cross_entropy(hidden, weight, target, z_loss=9.0, reduction="sum", backend=backend)
    kept = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(g.isinf().any() for g in kept)
    assert all(not g.any() for g in torch.autograd.grad(loss * 0.0, (hidden, weight)))
