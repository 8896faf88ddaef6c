"""importance_weights against its formula, and its edges."""

from __future__ import annotations

import math

import pytest
import torch

from prism_fast.ops import importance_weights


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights(mode, generator):
    lengths = [4, 0, 1, 6, 3]
    n = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    logp = torch.randn(n + 2, generator=generator, dtype=torch.float64, requires_grad=True)
    rollout = logp.detach() - 0.5 * torch.randn(n + 2, generator=generator, dtype=torch.float64)
    found = importance_weights(rollout, logp, cu_seqlens, mode=mode, low=0.6, high=1.4)
    ratios = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        drift = (logp - rollout).detach()[a:b]
        ratios.append(drift.exp() if mode.startswith("token") else drift.sum().exp().expand(b - a))
    flat = torch.cat(ratios)
    inside = (flat >= 0.6) & (flat <= 1.4)
    wanted = flat.clamp(0.6, 1.4) if mode.endswith("truncate") else flat * inside
    torch.testing.assert_close(found.weight[:n], wanted, rtol=1e-13, atol=0)
    assert torch.equal(found.weight[n:], torch.zeros(2, dtype=torch.float64)) and not found.weight.requires_grad
    first = cu_seqlens[:-1].long()[cu_seqlens.diff() > 0] if mode.startswith("sequence") else torch.arange(n)
    each, moved = wanted[first], ~inside[first]
    assert found.effective_sample_size == pytest.approx((each.sum() ** 2 / (each**2).sum()).item())
    share = moved.double().mean().item()
    expected = (0.0, share) if mode.endswith("truncate") else (share, 0.0)
    assert (found.masked_fraction.item(), found.clipped_fraction.item()) == pytest.approx(expected)


def test_importance_weights_edges():
    one = torch.tensor([0, 1], dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.float64)
    far = importance_weights(zero, zero + 100, one, mode="token_truncate", low=0.0, high=1e30)
    assert far.weight.item() == pytest.approx(math.exp(20.0))
    for mode in ("token_mask", "sequence_mask"):
        assert importance_weights(zero, zero * math.nan, one, mode=mode, low=0.5, high=2.0).weight.isnan().all()
        none = importance_weights(zero[:0], zero[:0], one[:1], mode=mode, low=0.5, high=2.0)
        assert none.weight.shape == (0,) and none.effective_sample_size == 0 and none.masked_fraction.isnan()
    with pytest.raises(ValueError, match="mode='token' is not one of"):
        importance_weights(zero, zero, one, mode="token", low=0.0, high=2.0)
    with pytest.raises(ValueError, match=r"high=0.5 must be finite and in \[1.0"):
        importance_weights(zero, zero, one, mode="token_mask", low=1.0, high=0.5)
