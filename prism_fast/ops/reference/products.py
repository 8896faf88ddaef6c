"""Matrix products of the specifications: with any derivative, and the same inside an autocast region."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [..., M, K] @ b [..., K, N]`` in the operands' own dtype, with gradients in it.

    Autocast acts on each operator when it runs: switched off around a forward alone, it would still change the products
    of a backward inside the region.
    """
    return a @ b if torch.compiler.is_compiling() else _Product.apply(a, b)


class _Product(torch.autograd.Function):
    """a @ b outside of autocast; its derivatives are `matmul` again, so that they are differentiable too."""

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
