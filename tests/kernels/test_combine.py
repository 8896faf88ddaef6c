"""Joining vocabulary slices against a float64 log-softmax of the whole row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels.logprob import combine_partials
from tests.support.triton_device import DEVICE


def partials(raw: torch.Tensor, width: int, factor: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, ...]:
    """m, s, u [SPLITS,N] of slices of ``width`` columns (the last one ragged), from raw scores [N,V]."""
    rows = []
    for x in raw.split(width, dim=1):
        m = x.amax(1)
        d = (x - m[:, None]) * torch.as_tensor(factor).reshape(-1, 1)
        rows.append((m, d.exp().sum(1), (d.exp() * d).sum(1)))
    return tuple(torch.stack(column).float().contiguous().to(DEVICE) for column in zip(*rows, strict=True))


def join(m, s, u, own):
    """At temperature 1."""
    return combine_partials(m, s, u, own, torch.ones(1, device=own.device))


@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("n,v,width", [(1, 1, 1), (5, 17, 4), (130, 300, 64), (128, 50, 64)])
def test_joined_rows_match_float64(n, v, width, shift, generator):
    raw = (torch.randn((n, v), generator=generator) * 6 + shift).float().double()
    target = torch.randint(v, (n,), generator=generator)
    own = raw.gather(1, target[:, None])[:, 0].float().to(DEVICE)
    for softcap, temperature in ((None, torch.ones(1)), (7.0, torch.rand(n, generator=generator) * 5 + 2)):
        factor = (softcap or 1.0) / temperature.double()
        out = combine_partials(*partials(raw, width, factor), own, temperature.to(DEVICE), softcap)
        logits = raw * factor[:, None]
        exact = logits.log_softmax(1)
        entropy = -(exact.exp() * exact).sum(1)
        assert out.row_max.cpu().equal(raw.amax(1).float())
        chosen = exact.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(out.logp.cpu().double(), chosen, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.entropy.cpu().double(), entropy, rtol=2e-6, atol=4e-6)
        total = out.row_max.cpu().double() * factor + out.log_sum.cpu().double()
        torch.testing.assert_close(total, logits.logsumexp(1), rtol=1e-6, atol=1e-5)


def test_slicing_does_not_matter(generator):
    logits = torch.randn((40, 96), generator=generator).double() * 4
    z = logits[:, 3].float().to(DEVICE)
    one, many = join(*partials(logits, 96), z), join(*partials(logits, 5), z)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_empty_slice_changes_nothing_and_an_empty_row_is_nan(generator):
    m, s, u = partials(torch.randn((6, 32), generator=generator).double(), 8)
    z = torch.zeros(6, device=DEVICE)
    nothing = [torch.full_like(m[:1], float("-inf")), torch.zeros_like(s[:1]), torch.zeros_like(u[:1])]
    padded = [torch.cat((a, b)) for a, b in zip((m, s, u), nothing, strict=True)]
    for a, b in zip(join(m, s, u, z), join(*padded, z), strict=True):
        assert a.equal(b)
    empty = join(*nothing, z)
    assert empty.logp.isnan().all() and empty.entropy.isnan().all()


def test_bad_target_is_nan_and_spares_the_entropy(generator):
    parts = partials(torch.randn((3, 8), generator=generator).double(), 4)
    good = join(*parts, torch.zeros(3, device=DEVICE))
    bad = join(*parts, torch.tensor([0.0, float("nan"), 0.0], device=DEVICE))
    assert bad.logp.isnan().tolist() == [False, True, False] and bad.entropy.equal(good.entropy)


def test_refusals():
    x, z = torch.zeros((2, 4)), torch.zeros(4)
    with pytest.raises(ValueError, match="SPLITS"):
        join(x, x, x, torch.zeros(5))
    with pytest.raises(ValueError, match="SPLITS"):
        join(x[:0], x[:0], x[:0], z)
    with pytest.raises(ValueError, match="u must be contiguous float32"):
        join(x, x, x.double(), z)
    with pytest.raises(ValueError, match=r"temperature \(3,\) is neither \[1\] nor \[4\]"):
        combine_partials(x, x, x, z, torch.ones(3))
