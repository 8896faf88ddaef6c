"""The interpreter with the shim computes bfloat16 as torch does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is not in use on a GPU machine", allow_module_level=True)

import numpy as np
import triton.language as tl

from tests.support import triton_device  # noqa: F401  (installs the shim)
from tests.support.triton_bf16 import narrow, widen


@triton.jit
def _arithmetic(x_ptr, y_ptr, sum_ptr, product_ptr, cast_ptr, f_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    x, y = tl.load(x_ptr + i, inside), tl.load(y_ptr + i, inside)
    tl.store(sum_ptr + i, x + y, inside)
    tl.store(product_ptr + i, x * y, inside)
    tl.store(cast_ptr + i, tl.load(f_ptr + i, inside).to(tl.bfloat16), inside)


@triton.jit
def _dot(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


def test_arithmetic_and_rounding(generator):
    n = 1000
    x, y = (torch.randn(n, generator=generator).bfloat16() for _ in range(2))
    f = torch.randn(n, generator=generator) * torch.logspace(-30, 30, n)
    f[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    out = [torch.empty(n, dtype=torch.bfloat16) for _ in range(3)]
    _arithmetic[(1,)](x, y, *out, f, n, BLOCK=1024)
    assert out[0].equal(x + y) and out[1].equal(x * y)
    torch.testing.assert_close(out[2], f.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_dot(generator):
    x, y = (torch.randn((32, 32), generator=generator).bfloat16() for _ in range(2))
    out = torch.empty((32, 32))
    _dot[(1,)](x, y, out, BLOCK=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


def test_narrow_is_round_to_nearest_even():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[np.isfinite(widen(bits))]
    assert (narrow(widen(finite)) == finite).all()
    half = (finite.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    assert (narrow(half) == torch.from_numpy(half).bfloat16().view(torch.int16).numpy().view(np.uint16)).all()
