"""Registration of an attention with PyTorch, for every implementation with a forward and a backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .forms import refuse_graph

TENSORS = 7  # q, k, v and the four of a PrefixLayout


def attention_operator(
    op: str, backend: str, forward: Callable, backward: Callable, tensors: int = TENSORS
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``prism_fast::<op>_<backend>`` with autograd and fake tensors: one node in a compiled graph.

    ``forward(q, k, v, cu_branch, prefix_start, prefix_len, branch_prefix, *numbers)`` gives the output [T, Hq, D] and
    the log-sum-exp [Hq, T]; ``backward(grad, q, k, v, out, lse, cu_branch, …, *numbers)`` gives dq, dk, dv. The
    log-sum-exp has no gradient. ``numbers`` are all plain numbers of the backend, the scale among them; ``tensors`` is
    the number of arguments before them.
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
    """The dtype of sums over keys."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def dense_heads(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the components of a head adjacent in memory, as the kernels read them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
