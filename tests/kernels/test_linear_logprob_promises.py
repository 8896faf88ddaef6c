"""linear_logprob by the Triton kernels: what it promises about rows, memory, bits and bad values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob
from tests.kernels.logprob_cases import eager, inputs, small_tiles  # noqa: F401
from tests.support.triton_device import DEVICE


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_rows_without_gradient_add_exactly_nothing(save, generator):
    hidden, weight, bias, target = inputs(generator, bias=True)
    with torch.no_grad():
        hidden[3], hidden[8] = float("nan"), float("inf")
    target[3] = -100
    g = torch.randn(70, generator=generator).to(DEVICE)
    g[8] = 0.0
    found = linear_logprob(hidden, weight, target, bias=bias, entropy=True, save=save, backend="triton")
    assert found.logp[3] == 0 and found.entropy[3] == 0
    gradients = torch.autograd.grad(found.logp, (hidden, weight, bias), grad_outputs=g)
    keep = torch.ones(70, dtype=torch.bool, device=DEVICE)
    keep[[3, 8]] = False
    part = linear_logprob(hidden[keep], weight, target[keep], bias=bias, save=save, backend="triton")
    wanted = torch.autograd.grad(part.logp, (hidden, weight, bias), grad_outputs=g[keep])
    assert torch.equal(gradients[0][~keep], torch.zeros(2, 48, device=DEVICE))
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


def test_all_rows_ignored_and_targets_outside(generator):
    hidden, weight, _, target = inputs(generator)
    found = linear_logprob(hidden, weight, torch.full_like(target, 7), ignore_index=7, entropy=True, backend="triton")
    (found.logp.sum() + found.entropy.sum()).backward()
    assert torch.equal(found.logp, torch.zeros_like(found.logp)) and not hidden.grad.any() and not weight.grad.any()
    target[0], target[1], target[2] = 150, -1, 2**32 + 5  # the last is a valid token in 32 bits
    found = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
    assert found.logp[:3].isnan().all() and found.logp[3:].isfinite().all() and found.entropy.isfinite().all()
    (gradient,) = torch.autograd.grad(found.logp.sum(), hidden)
    assert gradient[:3].isnan().any(-1).all() and gradient[3:].isfinite().all()


def test_banned_tokens_have_probability_zero(generator):
    hidden, weight, bias, target = inputs(generator, bias=True)
    with torch.no_grad():
        bias[:64], bias[100] = -float("inf"), -float("inf")  # a whole tile among them
    banned = bias.isinf()
    target = torch.where(banned[target], 70, target)
    found = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend="triton")
    renumbered = (~banned).cumsum(0)[target] - 1
    wanted = eager(hidden.double(), weight[~banned].double(), bias[~banned].double(), renumbered)
    torch.testing.assert_close([x.double() for x in found], list(wanted), rtol=1e-5, atol=1e-5)
    (found.logp + found.entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and not weight.grad[banned].any()


def test_nan_and_infinite_states_show(generator):
    hidden, weight, _, target = inputs(generator)
    with torch.no_grad():
        hidden[1, 4], hidden[2, 4] = float("nan"), float("inf")
    logp = linear_logprob(hidden, weight, target, backend="triton").logp
    assert logp.isnan().nonzero().flatten().tolist() == [1, 2]


def test_second_backward_raises_where_the_exponentials_were_reused(generator):
    hidden, weight, _, target = inputs(generator)
    loss = linear_logprob(hidden, weight, target, save="logits", backend="triton").logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob: a second backward.*pass save=.recompute."):
        loss.backward()
    again = linear_logprob(hidden, weight, target, save="recompute", backend="triton").logp.sum()
    again.backward(retain_graph=True)
    again.backward()


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_operands_and_weight_grad_out(dtype, save, generator, monkeypatch):
    from prism_fast.ops import products as module

    products = []
    for name in ("product", "add_product"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: products.append(name) or real(*a))
    hidden, weight, _, target = inputs(generator, dtype=dtype)
    g = torch.randn(70, generator=generator).to(DEVICE)
    whole = torch.autograd.grad(
        linear_logprob(hidden, weight, target, save=save, backend="triton").logp, (hidden, weight), grad_outputs=g
    )
    every = len(products)
    products.clear()
    only_hidden = linear_logprob(hidden, weight.detach(), target, save=save, backend="triton").logp
    assert torch.equal(torch.autograd.grad(only_hidden, hidden, grad_outputs=g)[0], whole[0])
    only_weight = linear_logprob(hidden.detach(), weight, target, save=save, backend="triton").logp
    assert torch.equal(torch.autograd.grad(only_weight, weight, grad_outputs=g)[0], whole[1])
    assert len(products) == every  # each of the two formed one of the two products
    start = torch.randn(weight.shape, generator=generator).to(DEVICE)
    bank = start.clone()
    linear_logprob(hidden, weight, target, save=save, weight_grad_out=bank, backend="triton").logp.backward(g)
    assert weight.grad is None
    torch.testing.assert_close(
        (bank - start).to(dtype), whole[1], rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
    )


def test_same_bits_twice_and_strided_inputs(generator):
    hidden, weight, _, target = inputs(generator, dtype=torch.bfloat16)
    loose = torch.zeros((70, 51), dtype=torch.bfloat16, device=DEVICE)  # rows at odd addresses
    loose[:, 3:] = hidden.detach()
    results = []
    for x, t in ((hidden, target), (hidden, target), (loose[:, 3:].requires_grad_(), target.repeat(2)[:70])):
        found = linear_logprob(x, weight, t, entropy=True, save="logits", backend="triton")
        loss = found.logp.sum() + found.entropy.sum()
        results.append((*found, *torch.autograd.grad(loss, (x, weight))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(generator):
    hidden, weight, _, target = inputs(generator, n=3)
    with pytest.raises(ValueError, match="hidden size divisible by 16, got 40"):
        linear_logprob(hidden[:, :40], weight[:, :40], target, backend="triton")
    with pytest.raises(NotImplementedError, match="no float64; pass backend='reference'"):
        linear_logprob(hidden.double(), weight.double(), target, backend="triton")
