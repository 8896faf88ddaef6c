"""Shared-prefix attention by one Triton kernel forward and two backward; see ``prism_fast.kernels.attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prefix_layout import OP, fitting, misfit, row_of
from ..prefix_operator import attention_operator, dense_heads
from ..results import PrefixLayout


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    """See ``prism_fast.ops.shared_prefix_attention``; the public op has already validated the arguments.

    Raises:
        NotImplementedError: float64, heads wider than 128, values of another width than keys, an unknown card.
    """
    if not takes(q, v):
        raise NotImplementedError(
            f"shared_prefix_attention: backend='triton' takes bfloat16, float16 or float32 with heads of at most 128, "
            f"values as wide as keys, got {q.dtype}, {q.shape[2]} and {v.shape[2]}; use backend='reference'"
        )
    layout = layout._replace(**{name: getattr(layout, name).contiguous() for name in layout._fields[:4]})
    prepared = layout.prepared
    found = prepared.lists if prepared is not None and prepared.row == row_of(q, k, layout) else lists(q, k, layout)
    return _operator(q, k, v, *layout[:4], found, scale)[0]


def takes(q: Tensor, v: Tensor) -> bool:
    return q.dtype != torch.float64 and q.shape[2] <= 128 and v.shape[2] == q.shape[2]


def lists(q: Tensor, k: Tensor, layout: PrefixLayout) -> Tensor:
    """[n] int32: the lists of ``prism_fast.kernels.attention`` for operands like these."""
    return _make_lists(q.detach(), k.detach(), *layout[:7])


@torch.library.custom_op("prism_fast::shared_prefix_lists", mutates_args=())
def _make_lists(
    q: Tensor,
    k: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    max_prefix: int,
    max_branch: int,
    max_queries: int | None,
) -> Tensor:
    from prism_fast.kernels.attention import make_lists, plan_for

    layout = PrefixLayout(cu_branch, prefix_start, prefix_len, branch_prefix, max_prefix, max_branch, max_queries)
    bad = misfit(layout, q.shape[0])
    return make_lists(plan_for(q, k, cu_branch), *fitting(layout, bad), bad)


@_make_lists.register_fake
def _(q, k, cu_branch, *rest):
    from prism_fast.kernels.attention import plan_for

    return cu_branch.new_empty(plan_for(q, k, cu_branch).size())


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    lists: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from prism_fast.kernels.attention import attend

    return attend(*dense_heads(q, k, v), cu_branch, prefix_start, prefix_len, branch_prefix, lists, scale)


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
    lists: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from prism_fast.kernels.attention import gradients

    grad, q, k, v = dense_heads(grad, q, k, v)
    return gradients(grad, q, k, v, out, lse, cu_branch, prefix_start, prefix_len, branch_prefix, lists, scale)


_operator = attention_operator(OP, "triton", _forward, _backward, tensors=8)
