"""Matrix products with fp32 accumulation whose output is wider than their operands, or is added to what is there.

cuBLAS does the plain ones. It cannot add a product of half-precision operands to a float32 matrix through PyTorch, so
that one goes through our own product where the card has tensor copies, and in slices of rows elsewhere.
"""

from __future__ import annotations

import torch

from prism_fast.kernels.gemm.persistent import TILES, addressable, matmul
from prism_fast.kernels.launch import card

SLICE_BYTES = 64 << 20


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` in ``dtype``, rounded once."""
    if not a.is_cuda:  # products of half-precision numbers are exact in float32
        wide = torch.promote_types(dtype, torch.float32)
        return (a.to(wide) @ b.to(wide)).to(dtype)
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out += a @ b`` for a float32 or float64 ``out``; operands of another dtype are never rounded."""
    if 0 in a.shape or 0 in b.shape:
        return
    if not a.is_cuda or a.dtype == out.dtype:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif out.dtype == torch.float32 and card(a.device)[1] // 10 in TILES and all(map(addressable, (a, b, out))):
        matmul(a, b, out=out, accumulate=True)
    else:
        rows = max(1, SLICE_BYTES // (4 * b.shape[1]))
        for at in range(0, a.shape[0], rows):
            out[at : at + rows] += torch.mm(a[at : at + rows], b, out_dtype=torch.float32)
