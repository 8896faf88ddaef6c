"""Shared-prefix attention by one Triton kernel forward and two backward; see ``prism_fast.kernels.attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prefix_operator import attention_operator, dense_heads
from ..results import PrefixLayout


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    """See ``prism_fast.ops.shared_prefix_attention``; arguments are already validated by the public op.

    Raises:
        NotImplementedError: float64, heads wider than 128, values of another width than keys, an unknown card.
    """
    if q.dtype == torch.float64 or q.shape[2] > 128 or v.shape[2] != q.shape[2]:
        raise NotImplementedError(
            f"shared_prefix_attention: backend='triton' takes bfloat16, float16 or float32 with heads of at most 128, "
            f"values as wide as keys, got {q.dtype}, {q.shape[2]} and {v.shape[2]}; use backend='reference'"
        )
    return _operator(q, k, v, *(x.contiguous() for x in layout[:4]), scale)[0]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from prism_fast.kernels.attention import attend

    return attend(*dense_heads(q, k, v), cu_branch, prefix_start, prefix_len, branch_prefix, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from prism_fast.kernels.attention import gradients

    grad, q, k, v = dense_heads(grad, q, k, v)
    return gradients(grad, q, k, v, out, lse, cu_branch, prefix_start, prefix_len, branch_prefix, scale)


_operator = attention_operator("shared_prefix_attention_triton", _forward, _backward)
