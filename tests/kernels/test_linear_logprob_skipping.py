"""linear_logprob by the Triton kernels: backward over the rows and vocabulary tiles that matter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob
from tests.kernels.logprob_cases import inputs, small_tiles  # noqa: F401
from tests.support.triton_device import DEVICE


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compacted_rows_give_the_same_gradients(dtype, save, generator):
    hidden, weight, bias, target = inputs(generator, dtype=dtype, bias=True)
    g = (
        torch.randn(70, generator=generator)
        .to(DEVICE)
        .masked_fill(torch.rand(70, generator=generator).to(DEVICE) < 0.6, 0)
    )
    with torch.no_grad():
        hidden[(g == 0).nonzero()[0]] = float("nan")
    bank = torch.zeros(weight.shape, device=DEVICE)
    results = []
    for options in ({}, {"compact_rows": True}, {"compact_rows": True, "weight_grad_out": bank}):
        for shift in (bias, None):
            found = linear_logprob(hidden, weight, target, bias=shift, save=save, backend="triton", **options)
            of = [x for x in (hidden, weight, shift) if x is not None]
            results.append(torch.autograd.grad(found.logp, of, grad_outputs=g, allow_unused=True))
    exact, plain = results[:2]
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(results[2], exact, **tolerance)
    torch.testing.assert_close(results[3], plain, **tolerance)
    assert results[2][0][g == 0].eq(0).all()
    assert results[4][1] is None
    torch.testing.assert_close(bank.to(dtype), exact[1] + plain[1], rtol=tolerance["rtol"], atol=4 * tolerance["atol"])


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_skipped_tiles_stay_within_their_bound(save, generator, monkeypatch):
    from prism_fast.kernels.gemm import sparse

    visited = []
    real = sparse.lists
    monkeypatch.setattr(sparse, "lists", lambda wanted, width: visited.append(wanted) or real(wanted, width))
    vocabulary, mass = 64 * 6, 2.0**-6
    hidden, weight, _, target = inputs(generator, vocabulary=vocabulary)
    with torch.no_grad():
        hidden.mul_(0.3)
        weight[64 * 2 :].mul_(0.3)
        hidden[:, 0], weight[: 64 * 2, 0] = 2.0, 4.0  # most of the mass lies in the first two tiles
    target[:60] %= 64 * 2
    target[60:] %= 64 * 3  # a target keeps its tile, however unlikely
    g = torch.randn(70, generator=generator).to(DEVICE)
    results = []
    for tile_skip_mass in (0.0, mass):
        found = linear_logprob(
            hidden, weight, target, temperature=0.8, save=save, tile_skip_mass=tile_skip_mass, backend="triton"
        )
        results.append((found.logp, *torch.autograd.grad(found.logp, (hidden, weight), grad_outputs=g)))
    exact, skipped = results
    assert torch.equal(exact[0], skipped[0])
    assert visited and not torch.cat([w.flatten() for w in visited]).all()
    lost = (g.abs() * mass / 0.8)[:, None]  # 1-norm of what a row of score gradients may lose
    assert ((exact[1] - skipped[1]).abs() <= lost * weight.abs().amax(0) + 1e-5).all()
    assert ((exact[2] - skipped[2]).abs() <= (lost * hidden.abs()).sum(0) + 1e-5).all()
    assert (exact[1] - skipped[1]).abs().max() > 1e-5  # something was left out
