"""Mixture of experts by the Triton kernels of ``prism_fast.kernels.moe``: three launches forward, six backward.

No data passes through the host, and every sum has a fixed order. The kernels read weights of any strides in place, and
the gradients have the same strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..moe_operator import operator, plain


def _forward(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    permutation: Tensor,
    tokens: Tensor,
    slots: Tensor,
    offsets: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(output [T, H], up-projection [M, 2I] in the order of the slots; [0, 2I] without ``keep``)."""
    from prism_fast.kernels import moe
    from prism_fast.kernels.launch import on_device

    _refuse(hidden)
    rows, inner = tokens.shape[0], down.shape[2]
    kept = hidden.new_empty((rows if keep else 0, 2 * inner))
    if rows == 0 or 0 in down.shape:
        return hidden.new_zeros((hidden.shape[0], down.shape[1])), kept
    tiles = moe.tiles_for(hidden)
    tokens, slots, offsets = tokens.contiguous(), slots.contiguous(), offsets.contiguous()
    with on_device(hidden):
        act = hidden.new_empty((rows, inner))
        moe.up_product(hidden, gate_up, tokens, offsets, tiles.up, pre=kept if keep else None, act=act)
        parts = moe.rows_product(act, down, None, offsets, tiles.rows)  # [M, H]
        return moe.combine_rows(parts, slots, plain(weights)), kept


def _backward(
    upstream: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    permutation: Tensor,
    tokens: Tensor,
    slots: Tensor,
    offsets: Tensor,
    kept: Tensor,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, gate_up, down and weights, each [0] where not wanted."""
    from prism_fast.kernels import moe
    from prism_fast.kernels.launch import on_device

    nothing, rows = hidden.new_empty, tokens.shape[0]
    if rows == 0 or 0 in down.shape:
        sources = (hidden, gate_up, down, weights)
        return [torch.zeros_like(x) if wanted else nothing(0) for x, wanted in zip(sources, wants, strict=True)]
    want_hidden, want_gate_up, want_down, want_weights = wants
    tiles = moe.tiles_for(hidden)
    permutation, tokens, slots, offsets = (x.contiguous() for x in (permutation, tokens, slots, offsets))
    d_down = d_gate_up = d_hidden = nothing(0)
    with on_device(hidden):
        if kept.shape[0] == 0:
            kept = hidden.new_empty((rows, gate_up.shape[1]))
            moe.up_product(hidden, gate_up, tokens, offsets, tiles.up, pre=kept, act=None)
        # [M, I], the activations' gradient before the routing weight; `swiglu_gradient` writes the activations over it
        act = moe.rows_product(upstream, down.transpose(1, 2), tokens, offsets, tiles.rows)
        d_pre, d_weights = moe.swiglu_gradient(act, kept, plain(weights), permutation)
        if want_down:
            d_down = moe.weight_gradient(
                down, upstream, act, tokens, offsets, tiles.weights, gather_a=True, gather_b=False
            )
        if want_gate_up:
            d_gate_up = moe.weight_gradient(
                gate_up, d_pre, hidden, tokens, offsets, tiles.weights, gather_a=False, gather_b=True
            )
        if want_hidden:
            parts = moe.rows_product(d_pre, gate_up.transpose(1, 2), None, offsets, tiles.rows)
            d_hidden = moe.combine_rows(parts, slots, None)
    return [d_hidden, d_gate_up, d_down, d_weights.to(weights.dtype) if want_weights else nothing(0)]


def _refuse(hidden: Tensor) -> None:
    if hidden.dtype == torch.float64:
        raise NotImplementedError("moe_experts: backend='triton' has no float64; pass backend='reference'")


run, _operator, _backward_operator = operator("triton", _forward, _backward)
