"""Matrix products of half-precision operands whose float32 sums are rounded once, or never.

On CUDA cuBLAS computes them with ``out_dtype`` float32: for a half-precision output it may cut a long sum into pieces
and add these in half precision. Elsewhere the operands are converted: products of half-precision numbers are exact in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A larger output has enough tiles for all multiprocessors of any card, so that cuBLAS has no reason to cut its sums; a
# float32 copy of a whole vocabulary's gradient would be expensive.
MANY = 1 << 26


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a [M, K] @ b [K, N]`` in ``dtype``, the operands' own or a wider one, rounded once."""
    if not _on_card(a):
        wide = torch.promote_types(dtype, torch.float32)
        return (a.to(wide) @ b.to(wide)).to(dtype)
    if a.dtype.itemsize > 2 or (dtype == a.dtype and a.shape[0] * b.shape[1] > MANY):
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=torch.float32).to(dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out [M, N] += a [M, K] @ b [K, N]`` for a float32 or float64 ``out``; nothing is rounded to half precision."""
    if not _on_card(a) or a.dtype == out.dtype:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += product(a, b, torch.float32)


def _on_card(x: Tensor) -> bool:
    return x.is_cuda
