"""Offsets beyond 2^31 elements, without the memory: rows that lie 2^30 elements apart in a buffer nobody fills.

The system hands out pages when they are written, so a buffer of 4 GB of which three rows are used costs three pages.
An offset computed in 32 bits would leave the buffer.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels import logprob
from prism_fast.ops import native
from prism_fast.ops.native.selected_logprob import run as native_logprob
from prism_fast.ops.reference.selected_logprob import selected_logprob as reference_logprob
from tests.kernels.logprob_cases import SMALL
from tests.support.triton_device import DEVICE

ROWS, COLUMNS, APART = 3, 40, 2**30


@pytest.fixture
def far() -> torch.Tensor:
    """[3, 40] bfloat16 whose last row begins at element 2^31."""
    try:
        buffer = torch.empty(2 * APART + COLUMNS + 8, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:  # no overcommitment of memory on this machine
        pytest.skip(f"no address space for 4 GB: {error}")
    return buffer.as_strided((ROWS, COLUMNS), (APART, 1))


def noise(generator, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("run", [reference_logprob, native_logprob])
def test_logits(run, far, generator):
    if run is native_logprob and not (native.has_cuda() if DEVICE == "cuda" else native.available()):
        pytest.skip(native.why_not())
    near = noise(generator, ROWS, COLUMNS, dtype=torch.bfloat16)
    far.copy_(near)
    found = []
    for logits in (near, far):
        logits.requires_grad_()
        out = run(logits, torch.tensor([4, 39, 0], device=DEVICE), temperature=0.8, entropy=True, ignore_index=-100)
        gradient = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), logits)[0]
        found.append((out.logp.detach(), out.entropy.detach(), gradient[2]))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_kept_exponentials_and_their_gradient(far, generator):
    hidden, weight = (noise(generator, n, 16, dtype=torch.bfloat16) for n in (ROWS, COLUMNS))
    target = torch.tensor([4, 39, 0], device=DEVICE)
    temperature, g, h = torch.ones(1, device=DEVICE), noise(generator, ROWS), noise(generator, ROWS)
    results = []
    for buffer in (torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE), far):
        kept = logprob.scores(hidden, weight, target, temperature, entropy=True, keep=buffer, tile=SMALL)
        gradient = logprob.gradient_(kept, target, temperature, g, h, COLUMNS)
        assert gradient.data_ptr() == buffer.data_ptr()
        results.append((kept.logp, kept.entropy, gradient.clone()))
    assert all(a.equal(b) for a, b in zip(*results, strict=True)) and results[0][2].abs().min() > 0
