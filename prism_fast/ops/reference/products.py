"""Matrix products of the specifications: with any derivative, and the same inside an autocast region."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [..., M, K] @ b [..., K, N]`` in the operands' own dtype, with gradients in it.

    Autocast looks at each operator when it runs. Switched off around a forward, it still takes the products of a
    backward that is called inside the region.
    """
    return a @ b if torch.compiler.is_compiling() else _Product.apply(a, b)


class _Product(torch.autograd.Function):
    """Its derivatives are products again, so that they have derivatives of their own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        return (
            matmul(upstream, b.transpose(-1, -2)) if wants_a else None,
            matmul(a.transpose(-1, -2), upstream) if wants_b else None,
        )

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent):
        a, b = ctx.saved_tensors
        parts = [matmul(x, y) for x, y in ((a_tangent, b), (a, b_tangent)) if x is not None and y is not None]
        return sum(parts[1:], parts[0])
