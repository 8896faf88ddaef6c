"""Expert routing by the compiled kernels: one launch forward and one backward on CUDA, threads on the CPU.

Semantics and validation: ``prism_fast.ops.route_experts``; arithmetic: ``csrc/route_experts.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_fast.ops import native

from ..forms import plain, refuse_duals, refuse_graph
from ..results import Routing
from . import calls

KERNEL = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CHUNK = 256  # rows of a chunk
MAX_EXPERTS = 256
MAX_CHOSEN = 8

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run(router_logits: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """router_logits [T, E]; the public op has already validated the arguments.

    weights, load and z_stat are differentiable once, in the logits. Keeps the logits, the weights and the choices. Does
    not synchronise, and can be captured in a CUDA graph. Raises NotImplementedError beyond 256 experts or 8 chosen,
    RuntimeError if the kernels are missing.
    """
    refuse_sizes("route_experts", router_logits.shape[1], top_k)
    if not plain(router_logits):
        return Routing(*_operator(router_logits, top_k, renormalize))
    refuse_duals("route_experts", "native", router_logits)
    if torch.is_grad_enabled() and router_logits.requires_grad:
        return Routing(*_Eager.apply(router_logits, top_k, renormalize))
    return Routing(*_run(router_logits, top_k, renormalize))


def refuse_sizes(op: str, experts: int, top_k: int) -> None:
    """Raise NotImplementedError for more experts or choices than the kernels hold."""
    if experts > MAX_EXPERTS or top_k > MAX_CHOSEN:
        raise NotImplementedError(
            f"{op}: the native kernels hold at most {MAX_EXPERTS} experts and top_k {MAX_CHOSEN}, got {experts} and "
            f"{top_k}; pass backend='reference'"
        )


def _kind(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _allocate(logits: Tensor, top_k: int) -> Parts:
    rows, experts = logits.shape
    kind = _kind(logits)
    # new_empty with a dtype takes twice the time of new_empty that inherits it.
    weights = logits.new_empty((rows, top_k)) if logits.dtype is kind else logits.new_empty((rows, top_k), dtype=kind)
    return weights, *_allocate_plan(logits, top_k, experts), weights.new_empty(experts), weights.new_empty(())


def _allocate_plan(like: Tensor, top_k: int, experts: int) -> Plan:
    """(experts, permutation, tokens, slots, offsets) of a Routing."""
    rows = like.shape[0]
    chosen = like.new_empty((rows, top_k), dtype=torch.int64)
    slots = like.new_empty((rows, top_k), dtype=torch.int32)
    return chosen, chosen.new_empty(rows * top_k), slots.new_empty(rows * top_k), slots, slots.new_empty(experts + 1)


def workspaces(like: Tensor, experts: int) -> tuple[Tensor | None, Tensor | None]:
    """(sums, counts) for ``into`` and ``plan_into``, uninitialised. None on the CPU, where twins allocate their own."""
    if not calls.on_card(like):
        return None, None
    chunks = -(-like.shape[0] // CHUNK)
    sums = torch.empty(chunks * (experts + 1), dtype=torch.float64, device=like.device)
    return sums, torch.empty((chunks + 1) * experts, dtype=torch.int32, device=like.device)


def _run(router_logits: Tensor, top_k: int, renormalize: bool) -> Parts:
    out = _allocate(router_logits, top_k)
    into(out, workspaces(router_logits, router_logits.shape[1]), router_logits, top_k, renormalize)
    return out


def into(
    out: Parts,
    workspace: tuple[Tensor | None, Tensor | None],
    router_logits: Tensor,
    top_k: int,
    renormalize: bool,
) -> None:
    """Write the fields of a Routing into ``out``."""
    logits = _rows(router_logits)
    weights, experts, permutation, tokens, slots, offsets, load, z_stat = out
    sums, counts = workspace
    kernel = getattr(native.module(), f"route_experts_{KERNEL[logits.dtype]}")
    with calls.on_device("route_experts", logits):
        # By position: eighteen keywords would take a tenth of the time of a call.
        kernel(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[0],
            logits.shape[1],
            top_k,
            renormalize,
            weights.data_ptr(),
            experts.data_ptr(),
            permutation.data_ptr(),
            tokens.data_ptr(),
            slots.data_ptr(),
            offsets.data_ptr(),
            load.data_ptr(),
            z_stat.data_ptr(),
            calls.address(sums),
            calls.address(counts),
            torch.get_num_threads(),
            calls.stream_of(logits),
        )


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _gradient(
    router_logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    weights_grad: Tensor | None,
    load_grad: Tensor | None,
    z_grad: Tensor | None,
    renormalize: bool,
) -> Tensor:
    """Gradient with respect to the logits, in their dtype."""
    gradient = torch.empty_like(router_logits, memory_format=torch.contiguous_format)
    logits = _rows(router_logits)
    row, column = (0, 0) if weights_grad is None else weights_grad.stride()
    kernel = getattr(native.module(), f"route_experts_backward_{KERNEL[logits.dtype]}")
    with calls.on_device("route_experts", logits):
        kernel(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            rows=logits.shape[0],
            experts=logits.shape[1],
            top_k=weights.shape[1],
            renormalize=renormalize,
            weights=weights.data_ptr(),
            chosen=experts.data_ptr(),
            weights_grad=calls.address(weights_grad),
            weights_grad_row=row,
            weights_grad_column=column,
            load_grad=calls.address(load_grad),
            load_grad_stride=0 if load_grad is None else load_grad.stride(0),
            z_grad=calls.address(z_grad),
            gradient=gradient.data_ptr(),
            threads=torch.get_num_threads(),
            stream=calls.stream_of(logits),
        )
    return gradient


class _Eager(torch.autograd.Function):
    """`_operator` without the dispatcher."""

    @staticmethod
    def forward(ctx, router_logits, top_k, renormalize):
        out = _run(router_logits, top_k, renormalize)
        ctx.save_for_backward(router_logits, *out[:2])
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(*out[1:6])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, weights_grad, _experts, _permutation, _tokens, _slots, _offsets, load_grad, z_grad):
        refuse_graph("route_experts", "native")
        gradient = _gradient(*ctx.saved_tensors, weights_grad, load_grad, z_grad, ctx.renormalize)
        return gradient, None, None


_operator = torch.library.custom_op("prism_fast::route_experts", _run, mutates_args=())
_gradient_operator = torch.library.custom_op("prism_fast::route_experts_gradient", _gradient, mutates_args=())


@_operator.register_fake
def _(router_logits: Tensor, top_k: int, renormalize: bool) -> Parts:
    return _allocate(router_logits, top_k)


@_gradient_operator.register_fake
def _(router_logits: Tensor, *arguments) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], *output[:2])
    ctx.renormalize = inputs[2]
    ctx.set_materialize_grads(False)


def _backward(ctx, weights_grad, _experts, _permutation, _tokens, _slots, _offsets, load_grad, z_grad):
    refuse_graph("route_experts", "native")
    gradient = _gradient_operator(*ctx.saved_tensors, weights_grad, load_grad, z_grad, ctx.renormalize)
    return gradient, None, None


_operator.register_autograd(_backward, setup_context=_keep)


def plan(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Routing:
    """top_k_index, top_k_weights [T, top_k]; the public op has already validated the arguments.

    Differentiable in the weights. Does not synchronise, and can be captured in a CUDA graph. Raises as ``run`` does.
    """
    refuse_sizes("plan_experts", num_experts, top_k_index.shape[1])
    index, given = top_k_index.long(), top_k_weights.to(_kind(top_k_weights))
    eager = plain(given)
    if eager:
        refuse_duals("plan_experts", "native", given)
    if not eager:
        parts = _plan_operator(index, given, num_experts)
    elif torch.is_grad_enabled() and given.requires_grad:
        parts = _EagerPlan.apply(index, given, num_experts)
    else:
        parts = _plan(index, given, num_experts)
    unknown = given.new_empty(0)
    return Routing(*parts, unknown, unknown)


def _plan(index: Tensor, given: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    index, given = index.contiguous(), given.contiguous()
    weights, out = torch.empty_like(given), _allocate_plan(index, index.shape[1], num_experts)
    plan_into((weights, *out), workspaces(index, num_experts)[1], index, given, num_experts)
    return weights, *out


def plan_into(
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    counts: Tensor | None,
    index: Tensor,
    given: Tensor,
    num_experts: int,
) -> None:
    """Write weights, experts, permutation, tokens, slots and offsets into ``out``; index and given are dense."""
    weights, experts, permutation, tokens, slots, offsets = out
    module = native.module()
    kernel = module.plan_experts_float64 if given.dtype == torch.float64 else module.plan_experts_float32
    with calls.on_device("plan_experts", given):
        kernel(
            index=index.data_ptr(),
            given=given.data_ptr(),
            rows=index.shape[0],
            experts=num_experts,
            top_k=index.shape[1],
            weights=weights.data_ptr(),
            chosen=experts.data_ptr(),
            permutation=permutation.data_ptr(),
            tokens=tokens.data_ptr(),
            slots=slots.data_ptr(),
            offsets=offsets.data_ptr(),
            counts=calls.address(counts),
            threads=torch.get_num_threads(),
            stream=calls.stream_of(given),
        )


def _plan_gradient(index: Tensor, upstream: Tensor, num_experts: int) -> Tensor:
    return upstream.masked_fill((index < 0) | (index >= num_experts), 0.0)


class _EagerPlan(torch.autograd.Function):
    """`_plan_operator` without the dispatcher."""

    @staticmethod
    def forward(ctx, index, given, num_experts):
        out = _plan(index, given, num_experts)
        ctx.save_for_backward(index)
        ctx.num_experts = num_experts
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, None, None
        return None, _plan_gradient(*ctx.saved_tensors, upstream, ctx.num_experts), None


_plan_operator = torch.library.custom_op("prism_fast::plan_experts", _plan, mutates_args=())


@_plan_operator.register_fake
def _(index: Tensor, given: Tensor, num_experts: int):
    weights = torch.empty_like(given, memory_format=torch.contiguous_format)
    return weights, *_allocate_plan(index, index.shape[1], num_experts)


def _keep_plan(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.num_experts = inputs[2]
    ctx.set_materialize_grads(False)


def _backward_plan(ctx, upstream, *_):
    if upstream is None:
        return None, None, None
    return None, _plan_gradient(*ctx.saved_tensors, upstream, ctx.num_experts), None


_plan_operator.register_autograd(_backward_plan, setup_context=_keep_plan)
