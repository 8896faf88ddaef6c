"""Autograd and registration of `moe_experts`, for every backend with a backward of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .forms import refuse_duals, refuse_graph
from .results import Routing

Run = Callable[..., Tensor]


def plain(weights: Tensor) -> Tensor:
    """Routing weights in the form that the Triton kernels read: float32, dense."""
    return weights.to(torch.float32).contiguous()


def operator(backend: str, forward: Callable, backward: Callable) -> tuple[Run, Callable, Callable]:
    """(run, forward operator, backward operator) registered as ``prism_fast::moe_experts_{backend}`` and
    ``…_backward``.

    ``forward(hidden, gate_up, down, weights, permutation, tokens, slots, offsets, keep)`` gives the output [T, H] and
    the up-projection [M, 2I] by slot, [0, 2I] without ``keep``; ``backward(upstream, <the eight tensors>, kept,
    wants)`` the gradients of hidden, gate_up, down and weights, each [0] where not wanted. Both are typed for
    ``torch.library.custom_op``.
    """

    op = "moe_experts"
    name = f"{op}_{backend}"

    class Eager(torch.autograd.Function):
        """The operator below without the dispatcher."""

        @staticmethod
        def forward(ctx, *arguments):
            out, kept = forward(*arguments)
            ctx.save_for_backward(*arguments[:-1], kept)
            return out

        @staticmethod
        def backward(ctx, upstream):
            return gradients(ctx, backward, upstream)

    forward_operator = torch.library.custom_op(f"prism_fast::{name}", forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"prism_fast::{name}_backward", backward, mutates_args=())

    @forward_operator.register_fake
    def _(hidden, gate_up, down, weights, permutation, tokens, slots, offsets, keep):
        kept = hidden.new_empty((permutation.shape[0] if keep else 0, 2 * down.shape[2]))
        return hidden.new_empty((hidden.shape[0], down.shape[1])), kept

    @backward_operator.register_fake
    def _(upstream, hidden, gate_up, down, weights, permutation, tokens, slots, offsets, kept, wants):
        dense = torch.empty_like(weights, memory_format=torch.contiguous_format)
        shapes = (hidden.new_empty(hidden.shape), torch.empty_like(gate_up), torch.empty_like(down), dense)
        return [x if wanted else hidden.new_empty(0) for x, wanted in zip(shapes, wants, strict=True)]

    def gradients(ctx, call, upstream):
        refuse_graph(op, backend)
        wants = list(ctx.needs_input_grad[:4])
        found = call(upstream, *ctx.saved_tensors, wants)
        return *(x if wanted else None for x, wanted in zip(found, wants, strict=True)), *(None,) * 5

    def setup(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:-1], output[1])

    def autograd(ctx, upstream, _):
        return gradients(ctx, backward_operator, upstream)

    forward_operator.register_autograd(autograd, setup_context=setup)

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, *, recompute: bool) -> Tensor:
        """The public op has already validated the arguments. Differentiable once; keeps its inputs and, without
        ``recompute``, the up-projection of every assignment [T · top_k, 2I]."""
        keep = not recompute and torch.is_grad_enabled()
        # A plan that a caller made by hand may have any strides; the kernels read its addresses as dense.
        plan = (x.contiguous() for x in (routing.permutation, routing.tokens, routing.slots, routing.offsets))
        arguments = (hidden, gate_up, down, routing.weights.contiguous(), *plan, keep)
        if torch.compiler.is_compiling():
            return forward_operator(*arguments)[0]
        refuse_duals(op, backend, *arguments[:4])
        return Eager.apply(*arguments)

    return run, forward_operator, backward_operator
