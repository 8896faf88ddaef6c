"""Mixture of experts by the Triton kernels of ``prism_fast.kernels.moe``: three launches forward, six backward.

Nothing passes through the host, and every sum has a fixed order. The weights are read where they lie, whatever their
strides, and their gradients are laid out like them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..moe_operator import operator


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, permutation: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(output [T, H], up-projection [M, 2I] in the order of the slots; [0, 2I] without ``keep``)."""
    from prism_fast.kernels import moe

    _refuse(hidden)
    slots, inner, top_k = permutation.shape[0], down.shape[2], weights.shape[1]
    kept = hidden.new_empty((slots if keep else 0, 2 * inner))
    if slots == 0 or 0 in down.shape:
        return hidden.new_zeros((hidden.shape[0], down.shape[1])), kept
    tiles = moe.tiles_for(hidden)
    permutation, offsets = permutation.contiguous(), offsets.contiguous()
    act = hidden.new_empty((slots, inner))
    moe.up_product(hidden, gate_up, permutation, offsets, top_k, tiles.up, pre=kept if keep else None, act=act)
    parts = moe.rows_product(act, down, permutation, offsets, tiles.rows)  # [M, H] by assignment
    return moe.combine(parts, _plain(weights), top_k), kept


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
    from prism_fast.kernels import moe

    nothing, slots = hidden.new_empty, permutation.shape[0]
    if slots == 0 or 0 in down.shape:
        sources = (hidden, gate_up, down, weights)
        return [torch.zeros_like(x) if wanted else nothing(0) for x, wanted in zip(sources, wants, strict=True)]
    want_hidden, want_gate_up, want_down, want_weights = wants
    tiles, top_k = moe.tiles_for(hidden), weights.shape[1]
    permutation, offsets = permutation.contiguous(), offsets.contiguous()
    if kept.shape[0] == 0:
        kept = hidden.new_empty((slots, gate_up.shape[1]))
        moe.up_product(hidden, gate_up, permutation, offsets, top_k, tiles.up, pre=kept, act=None)
    d_pre, act, d_weights = moe.act_gradient(upstream, down, kept, _plain(weights), permutation, offsets, tiles.act)
    d_down = d_gate_up = d_hidden = nothing(0)
    if want_down:
        d_down = moe.weight_gradient(
            down, upstream, act, permutation, offsets, top_k, tiles.weights, gather_a=True, gather_b=False
        )
    if want_gate_up:
        d_gate_up = moe.weight_gradient(
            gate_up, d_pre, hidden, permutation, offsets, top_k, tiles.weights, gather_a=False, gather_b=True
        )
    if want_hidden:
        parts = moe.rows_product(d_pre, gate_up.transpose(1, 2), permutation, offsets, tiles.rows)
        d_hidden = moe.combine(parts, None, top_k)
    return [d_hidden, d_gate_up, d_down, d_weights.to(weights.dtype) if want_weights else nothing(0)]


def _plain(weights: Tensor) -> Tensor:
    return weights.to(torch.float32).contiguous()


def _refuse(hidden: Tensor) -> None:
    if hidden.dtype == torch.float64:
        raise NotImplementedError("moe_experts: backend='triton' has no float64; pass backend='reference'")


run, _operator, _backward_operator = operator("moe_experts_triton", _forward, _backward)
