"""Mixture of experts from PyTorch's matrix products: a loop over experts whose backward is written out.

Autograd of the same loop would keep the gathered inputs and three activations per assignment, and form each expert's
weight gradient in a zero tensor of all experts' size. Here the up-projection alone is kept, and every product writes to
where its result belongs. A loop rather than ``torch.nn.functional.grouped_mm``: on the CPU that is a loop inside, has
no float64, and its operands must be gathered for all experts at once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..moe_operator import operator


def _experts(permutation: Tensor, offsets: Tensor, top_k: int) -> list[tuple[int, slice, Tensor, Tensor]]:
    """(expert, its slots, tokens [n], assignments [n]) of every expert that has any."""
    borders = offsets.tolist()
    token = permutation.div(top_k, rounding_mode="floor")
    slots = [(e, slice(*border)) for e, border in enumerate(pairwise(borders))]
    return [(e, s, token[s], permutation[s]) for e, s in slots if s.start < s.stop]


class _Scratch:
    """Memory for one expert's rows [n, width], used for all experts in turn: fresh pages cost as much as arithmetic."""

    def __init__(self, experts: list[tuple[int, slice, Tensor, Tensor]], like: Tensor) -> None:
        self.rows, self.like, self.held = max((s.stop - s.start for _, s, _, _ in experts), default=0), like, {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self.held:
            self.held[name] = self.like.new_empty((self.rows, width))
        return self.held[name][:rows]


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, permutation: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(output [T, H], up-projection [M, 2I] in the order of the slots; [0, 2I] without ``keep``)."""
    width, inner = down.shape[1:]
    kept = hidden.new_empty((permutation.shape[0] if keep else 0, 2 * inner))
    out = torch.zeros((hidden.shape[0], down.shape[1]), dtype=weights.dtype, device=hidden.device)
    flat = weights.reshape(-1)
    # Results are written in place, which autograd would refuse; operands keep the dtype that the caller chose.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        experts = _experts(permutation, offsets, weights.shape[1])
        scratch = _Scratch(experts, hidden)
        for e, slots, token, mine in experts:
            n = len(token)
            x = torch.index_select(hidden, 0, token, out=scratch("x", n, width))
            pre = torch.mm(x, gate_up[e].t(), out=kept[slots] if keep else scratch("pre", n, 2 * inner))
            gate, up = pre.split(inner, 1)
            act = torch.ops.aten.silu.out(gate, out=scratch("act", n, inner)).mul_(up)
            each = torch.mm(act, down[e].t(), out=x)
            # A token meets an expert at most once and experts come in order: the order of every sum is fixed.
            out.index_add_(0, token, each.to(out.dtype).mul_(flat[mine, None]))
    return out.to(hidden.dtype), kept


def _backward(
    upstream: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    kept: Tensor,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, gate_up, down and weights, each [0] where not wanted."""
    want_hidden, want_gate_up, want_down, want_weights = wants
    (width, inner), nothing = down.shape[1:], hidden.new_empty
    d_hidden = torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device) if want_hidden else nothing(0)
    # Experts without a token get zeros; all others are overwritten.
    d_gate_up = torch.zeros_like(gate_up) if want_gate_up else nothing(0)
    d_down = torch.zeros_like(down) if want_down else nothing(0)
    d_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format) if want_weights else nothing(0)
    flat = weights.reshape(-1)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        experts = _experts(permutation, offsets, weights.shape[1])
        scratch = _Scratch(experts, hidden)
        for e, slots, token, mine in experts:
            n, share = len(token), flat[mine, None].to(hidden.dtype)
            x = torch.index_select(hidden, 0, token, out=scratch("x", n, width))
            g = torch.index_select(upstream, 0, token, out=scratch("g", n, width))
            if kept.shape[0]:
                pre = kept[slots]
            else:
                pre = torch.mm(x, gate_up[e].t(), out=scratch("pre", n, 2 * inner))
            gate, up = pre.split(inner, 1)
            act = torch.ops.aten.silu.out(gate, out=scratch("act", n, inner))
            d_act = torch.mm(g, down[e], out=scratch("d_act", n, inner))  # before the routing weight
            product = torch.mul(act, up, out=scratch("product", n, inner))
            d_pre = scratch("d_pre", n, 2 * inner)
            if want_weights:
                d_weights.view(-1)[mine] = torch.mul(d_act, product, out=d_pre[:, :inner]).sum(1, dtype=weights.dtype)
            if want_down:
                torch.mm(g.mul_(share).t(), product, out=d_down[e])
            if not want_hidden and not want_gate_up:
                continue
            torch.mul(d_act.mul_(share), act, out=d_pre[:, inner:])
            torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_pre[:, :inner])
            if want_gate_up:
                torch.mm(d_pre.t(), x, out=d_gate_up[e])
            if want_hidden:
                d_hidden.index_add_(0, token, torch.mm(d_pre, gate_up[e], out=g).to(d_hidden.dtype))
    return [d_hidden.to(hidden.dtype), d_gate_up, d_down, d_weights]


run, _operator, _backward_operator = operator("moe_experts_stock", _forward, _backward)
