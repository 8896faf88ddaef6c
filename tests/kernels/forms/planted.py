"""Forms that are wrong on purpose: the compile test has to name each of them. No area of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels import logprob
from tests.kernels.forms import Form, empty
from tests.support.fake_card import DEVICE


@triton.jit
def double_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """A constant below the smallest normal float32: Triton takes it, and all that meets it, for float64."""
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.log(tl.maximum(tl.load(x_ptr + at), 1e-38)))


@triton.jit
def spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Tiles of a product in a single warp: two of them are more than its registers."""
    at = tl.arange(0, N)
    whole = at[:, None] * N + at[None, :]
    x = tl.load(x_ptr + whole)
    total = tl.dot(x, x)
    for _ in range(2):
        total = tl.dot(x, (total + tl.trans(total)).to(tl.bfloat16), total)
    tl.store(y_ptr + whole, total)


def oversized(n: int) -> None:
    """The scores of a bfloat16 head at a tile whose load stages alone are larger than shared memory."""
    hidden, weight = empty(n, 2560, dtype=torch.bfloat16), empty(151_936, 2560, dtype=torch.bfloat16)
    tile = logprob.Tile(128, 256, 64, 8, 5, 8, True)
    with torch.cuda.device(DEVICE):
        logprob.scores(hidden, weight, empty(n, dtype=torch.int64), empty(1), keep=True, tile=tile)


def in_double(n: int) -> None:
    with torch.cuda.device(DEVICE):
        double_kernel[(1,)](empty(n), empty(n), N=128)


def spilling(n: int) -> None:
    """Launched without its card being current, too."""
    spilling_kernel[(1,)](empty(n, n, dtype=torch.bfloat16), empty(n, n), N=n, num_warps=1)


def recompiling(n: int) -> None:
    with torch.cuda.device(DEVICE):
        double_kernel[(1,)](empty(n), empty(n), N=n)


def forms() -> list[Form]:
    return [
        Form("bf16 oversized", oversized, (4096, 1000)),
        Form("fp32 double", in_double, (128,)),
        Form("bf16 spilling", spilling, (64,)),
        Form("fp32 recompiling", recompiling, (128, 64)),
    ]
