"""Mixture of SwiGLU experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from ..results import Routing
from .products import matmul

OP = "moe_experts"


def moe_experts(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, *, recompute: bool) -> Tensor:
    """See ``prism_fast.ops.moe_experts``."""
    # Reading the offsets is free on a CPU, but would synchronise a GPU and break a graph. There every expert computes
    # every token, with weight 0 for tokens that did not choose it.
    grouped = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    run = _grouped if grouped else _dense
    with torch.autocast(hidden.device.type, enabled=False):  # operands keep the dtype that the caller chose
        if recompute and torch.is_grad_enabled():
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"{OP}: backend='reference' does not recompute inside torch.func transforms; pass recompute=False"
                )
            return checkpoint(run, hidden, gate_up, down, routing, use_reentrant=False)
        return run(hidden, gate_up, down, routing)


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[n, H] output of one expert: down(silu(gate x) * up x)."""
    pre, inner = matmul(x, gate_up.t()), down.shape[1]
    # Not `chunk`: its backward concatenates, and autocast on the CPU refuses to do that to float16.
    return matmul(silu(pre[:, :inner]) * pre[:, inner:], down.t())


def _grouped(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    token, borders = routing.tokens, routing.offsets.tolist()
    parts = [_expert(hidden[token[borders[e] : borders[e + 1]]], gate_up[e], down[e]) for e in range(gate_up.shape[0])]
    return combine(torch.cat(parts), routing).to(hidden.dtype)


def combine(rows: Tensor, routing: Routing) -> Tensor:
    """[T, H] weighted sum, in the dtype of the weights, of the experts' rows [M, H] in the order of the permutation."""
    # Gathered by assignment and summed over top_k in a fixed order, not scattered by slot in any order.
    return (rows.to(routing.weights.dtype)[routing.slots] * routing.weights[..., None]).sum(1)


def _dense(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    out = hidden.new_zeros((hidden.shape[0], down.shape[1]), dtype=routing.weights.dtype)
    for e in range(gate_up.shape[0]):
        asked = routing.experts == e
        share = torch.where(asked, routing.weights, 0.0).sum(-1, keepdim=True)
        each = _expert(hidden, gate_up[e], down[e]).to(out.dtype) * share
        out = out + torch.where(asked.any(-1, keepdim=True), each, 0.0)
    return out.to(hidden.dtype)
