"""Inputs, the eager formula and the accuracy contract for the log-probability kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, log_softmax

from prism_fast.kernels.logprob import Tile, tiles
from prism_fast.ops import linear_logprob
from tests.support.triton_device import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Tile(n=64, v=64, h=32, group=2, stages=2, warps=4, split=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and waves with few programs; both forms of the epilogue."""
    monkeypatch.setattr(tiles, "TILES", {b: SMALL._replace(split=not b.rich) for b in tiles.TILES})
    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_UNIT", 48)
    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_BYTES", 1)
    monkeypatch.setattr("prism_fast.ops.budgets.WAVE_BYTES_LARGE", 1)
    monkeypatch.setattr("prism_fast.ops.triton.linear_logprob.STATISTICS_ROWS", 56)


def inputs(generator, n=70, width=48, vocabulary=150, dtype=torch.float32, bias=False):
    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()

    target = torch.randint(0, vocabulary, (n,), generator=generator).to(DEVICE)
    return noise(n, width), noise(vocabulary, width), noise(vocabulary) if bias else None, target


def eager(hidden, weight, bias, target, temperature=1.0, softcap=None, ignored=None):
    """(logp, entropy) by plain autograd in the dtype of the inputs."""
    z = linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature)
    full = log_softmax(z, -1)
    logp, entropy = full.gather(1, target[:, None])[:, 0], -(full.exp() * full).sum(-1)
    return (logp, entropy) if ignored is None else (logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0))


def within_contract(ours, usual, exact, dtype, c):
    """Normwise and maximum error: at most c times that of eager PyTorch plus 4 units in the last place."""
    for measure in (torch.linalg.vector_norm, lambda x: x.abs().amax() if x.numel() else x.new_zeros(())):
        allowed = c * measure(usual.double() - exact) + 4 * torch.finfo(dtype).eps * measure(exact)
        error = measure(ours.double() - exact)
        assert error <= allowed, (error.item(), allowed.item())


def check(operands, target, g, h, *, entropy=True, **options):
    """Values and gradients of the op against float64, relative to what eager PyTorch of that dtype achieves."""
    dtype = operands[0].dtype
    formula = {k: options[k] for k in ("temperature", "softcap") if k in options}
    ignored = target == -100
    safe = target.masked_fill(ignored, 0)
    there = [x for x in operands if x is not None]
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    exact = eager(*doubles, safe, **formula, ignored=ignored)
    usual = eager(*operands, safe, **formula, ignored=ignored)
    found = linear_logprob(operands[0], operands[1], target, bias=operands[2], entropy=entropy, backend="triton",
                           **options)  # fmt: skip
    assert found.logp.dtype == torch.float32 and (found.logp <= 0).all()
    c = 2.0 if dtype == torch.float32 else 1.0
    results = list(zip(found, usual, exact, (g, h), strict=True))[: 2 if entropy else 1]
    for ours, theirs, true, _ in results:
        within_contract(ours, theirs, true, dtype, c)

    def gradients(column, of):
        total = sum((row[column].double() * row[3].double()).sum() for row in results)
        return torch.autograd.grad(total, of)

    triples = zip(gradients(0, there), gradients(1, there), gradients(2, [x for x in doubles if x is not None]),
                  strict=True)  # fmt: skip
    for ours, theirs, true in triples:
        within_contract(ours, theirs, true, dtype, 2.0)
    return found


def upstream(generator, n):
    return (torch.randn(n, generator=generator).to(DEVICE) for _ in range(2))
