"""Registration of an attention with PyTorch, the same for every implementation that brings both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .forms import refuse_graph

TENSORS = 7  # q, k, v and the four of a PrefixLayout


def attention_operator(
    op: str, backend: str, forward: Callable, backward: Callable, tensors: int = TENSORS
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``prism_fast::<op>_<backend>`` with autograd and fake tensors: whole graphs hold it as one node.

    ``forward(q, k, v, cu_branch, prefix_start, prefix_len, branch_prefix, *numbers)`` gives the output [T, Hq, D] and
    the log-sum-exp [Hq, T]; ``backward(grad, q, k, v, out, lse, cu_branch, …, *numbers)`` gives dq, dk, dv. The
    log-sum-exp has no gradient. ``numbers`` are whatever plain numbers the backend needs, the scale among them;
    ``tensors`` stand before them.
    """
    name = f"{op}_{backend}"
    operator = torch.library.custom_op(f"prism_fast::{name}", forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"prism_fast::{name}_backward", backward, mutates_args=())

    @operator.register_fake
    def _(q, k, v, *rest):
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=sum_dtype(q))

    @backward_operator.register_fake
    def _(grad, q, k, v, *rest):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx, inputs, output):
        ctx.numbers = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, grad, _):
        refuse_graph(op, backend)
        q, k, v, *layout, out, lse = ctx.saved_tensors
        gradients = backward_operator(grad, q, k, v, out, lse, *layout, *ctx.numbers)
        return *gradients, *[None] * (len(layout) + len(ctx.numbers))

    operator.register_autograd(differentiate, setup_context=save)
    return operator


def sum_dtype(q: Tensor) -> torch.dtype:
    """In which sums over keys are kept."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def dense_heads(*tensors: Tensor) -> list[Tensor]:
    """The kernels read a head's components one behind the other."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
