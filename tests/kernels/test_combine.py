"""Joining vocabulary slices against a float64 log-softmax of the whole row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels.logprob import combine_partials
from tests.support.triton_device import DEVICE


def partials(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m, s, u [SPLITS,N] of slices of ``width`` columns (the last one ragged), from logits [N,V]."""
    rows = []
    for z in logits.split(width, dim=1):
        m = z.amax(1)
        e = (z - m[:, None]).exp()
        rows.append((m, e.sum(1), (e * (z - m[:, None])).sum(1)))
    return tuple(torch.stack(column).float().contiguous().to(DEVICE) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("n,v,width", [(1, 1, 1), (5, 17, 4), (130, 300, 64), (128, 50, 64)])
def test_joined_rows_match_float64(n, v, width, shift, generator):
    logits = (torch.randn((n, v), generator=generator) * 6 + shift).float().double()
    target = torch.randint(v, (n,), generator=generator)
    z = logits.gather(1, target[:, None])[:, 0].float().to(DEVICE)
    out = combine_partials(*partials(logits, width), z)
    exact = logits.log_softmax(1)
    entropy = -(exact.exp() * exact).sum(1)
    assert out.row_max.cpu().equal(logits.amax(1).float())
    torch.testing.assert_close(out.logp.cpu().double(), exact.gather(1, target[:, None])[:, 0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy.cpu().double(), entropy, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close((out.row_max + out.log_sum).cpu().double(), logits.logsumexp(1), rtol=1e-6, atol=1e-5)


def test_slicing_does_not_matter(generator):
    logits = torch.randn((40, 96), generator=generator).double() * 4
    z = logits[:, 3].float().to(DEVICE)
    one, many = combine_partials(*partials(logits, 96), z), combine_partials(*partials(logits, 5), z)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_empty_slice_changes_nothing_and_an_empty_row_is_nan(generator):
    m, s, u = partials(torch.randn((6, 32), generator=generator).double(), 8)
    z = torch.zeros(6, device=DEVICE)
    nothing = [torch.full_like(m[:1], float("-inf")), torch.zeros_like(s[:1]), torch.zeros_like(u[:1])]
    padded = [torch.cat((a, b)) for a, b in zip((m, s, u), nothing, strict=True)]
    for a, b in zip(combine_partials(m, s, u, z), combine_partials(*padded, z), strict=True):
        assert a.equal(b)
    empty = combine_partials(*nothing, z)
    assert empty.logp.isnan().all() and empty.entropy.isnan().all()


def test_bad_target_is_nan_and_spares_the_entropy(generator):
    parts = partials(torch.randn((3, 8), generator=generator).double(), 4)
    good = combine_partials(*parts, torch.zeros(3, device=DEVICE))
    bad = combine_partials(*parts, torch.tensor([0.0, float("nan"), 0.0], device=DEVICE))
    assert bad.logp.isnan().tolist() == [False, True, False] and bad.entropy.equal(good.entropy)


def test_refusals():
    x, z = torch.zeros((2, 4)), torch.zeros(4)
    with pytest.raises(ValueError, match="SPLITS"):
        combine_partials(x, x, x, torch.zeros(5))
    with pytest.raises(ValueError, match="SPLITS"):
        combine_partials(x[:0], x[:0], x[:0], z)
    with pytest.raises(ValueError, match="u must be contiguous float32"):
        combine_partials(x, x, x.double(), z)
