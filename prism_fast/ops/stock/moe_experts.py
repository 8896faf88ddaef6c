"""Mixture of experts by ``torch.nn.functional.grouped_mm``, with one pass over memory for each step between products.

On CUDA these passes are the kernels of ``prism_fast.kernels.moe.rows``, on the CPU plain PyTorch. On CUDA no data
passes through the host, and every sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from .. import triton
from ..backend import CURE
from ..moe_operator import operator, plain

ALIGNMENT = 16  # bytes
CARDS = (9, 10)  # major compute capabilities where grouped_mm reads the offsets on the device, for bfloat16


def refusal(hidden: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Why grouped_mm cannot take these operands, or None. Looks at shapes, dtypes, strides and the card."""
    size, (width, inner) = hidden.element_size(), down.shape[1:]
    if hidden.is_cuda:
        major = torch.cuda.get_device_properties(hidden.device).major
        if hidden.dtype != torch.bfloat16 or major not in CARDS:
            return (
                f"takes bfloat16 on compute capability 9.x and 10.x (elsewhere grouped_mm reads the offsets on the "
                f"host); got {hidden.dtype} on {major}.x"
            )
    if hidden.dtype == torch.float64 or width * size % ALIGNMENT or inner * size % ALIGNMENT:
        return (
            f"takes float32 and half precision, and H and I that are multiples of {ALIGNMENT} bytes; got "
            f"{hidden.dtype}, H {width}, I {inner}"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not _addressable(weight):
            return (
                f"takes weights whose rows or columns are dense and start at multiples of {ALIGNMENT} bytes; got "
                f"{name} with strides {weight.stride()} at offset {weight.storage_offset()}"
            )
    return None


def _addressable(weight: Tensor) -> bool:
    expert, row, column = weight.stride()
    far = row if column == 1 else column
    starts = (expert, far, weight.storage_offset())
    return 1 in (row, column) and not any(x * weight.element_size() % ALIGNMENT for x in starts)


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
    _refuse(hidden, gate_up, down)
    rows, nothing = _rows(hidden), hidden.new_empty((0, gate_up.shape[1]))
    if len(tokens) == 0 or 0 in down.shape:
        kept = hidden.new_zeros((len(tokens), gate_up.shape[1])) if keep else nothing
        return hidden.new_zeros(hidden.shape), kept
    tokens, slots, ends = tokens.contiguous(), slots.contiguous(), offsets[1:].contiguous()
    with torch.no_grad(), rows.on_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        pre = grouped_mm(rows.gather_rows(hidden, tokens), gate_up.transpose(1, 2), offs=ends)  # [M, 2I]
        parts = grouped_mm(rows.swiglu(pre), down.transpose(1, 2), offs=ends)  # [M, H]
        return rows.combine_rows(parts, slots, plain(weights)), pre if keep else nothing


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
    rows, nothing = _rows(hidden), hidden.new_empty
    if len(tokens) == 0 or 0 in down.shape:
        sources = (hidden, gate_up, down, weights)
        return [torch.zeros_like(x) if wanted else nothing(0) for x, wanted in zip(sources, wants, strict=True)]
    want_hidden, want_gate_up, want_down, want_weights = wants
    permutation, tokens, slots, offsets = (x.contiguous() for x in (permutation, tokens, slots, offsets))
    ends = offsets[1:].contiguous()
    d_hidden = d_gate_up = d_down = nothing(0)
    with torch.no_grad(), rows.on_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        if kept.shape[0] == 0:
            kept = grouped_mm(rows.gather_rows(hidden, tokens), gate_up.transpose(1, 2), offs=ends)
        g = rows.gather_rows(upstream, tokens)
        act = grouped_mm(g, down, offs=ends)  # [M, I], the activations' gradient before the routing weight
        d_pre, share = rows.swiglu_gradient(act, kept, plain(weights), permutation)  # act: the weighted activations
        if want_down:
            d_down = _over_slots(down, g, act, offsets, ends, rows)
        del g, act
        if want_gate_up:
            d_gate_up = _over_slots(gate_up, d_pre, rows.gather_rows(hidden, tokens), offsets, ends, rows)
        if want_hidden:
            d_hidden = rows.combine_rows(grouped_mm(d_pre, gate_up, offs=ends), slots, None)
    return [d_hidden, d_gate_up, d_down, share.to(weights.dtype) if want_weights else nothing(0)]


def _over_slots(like: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ends: Tensor, rows) -> Tensor:
    """[E, R, N] in the strides of ``like``: per expert aᵀ b over its slots, a [M, R], b [M, N]; zeros without slots."""
    transposed = like.stride(2) != 1
    left, right = (b, a) if transposed else (a, b)
    found = grouped_mm(left.t(), right, offs=ends)
    rows.clear_idle(found, offsets)
    found = found.transpose(1, 2) if transposed else found
    wanted = torch.empty_like(like, device="meta").stride()
    return found if found.stride() == wanted else torch.empty_like(like).copy_(found)


def _rows(x: Tensor):
    """The passes between the products, for the device of ``x``."""
    if x.is_cuda:
        if not triton.available():
            raise RuntimeError(
                f"moe_experts: backend='stock' computes on CUDA with kernels of Triton, which is not installed; {CURE}"
            )
        from prism_fast.kernels.moe import rows
    else:
        from . import expert_rows as rows
    return rows


def _refuse(hidden: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if found := refusal(hidden, gate_up, down):
        cure = "triton" if hidden.is_cuda and hidden.dtype != torch.float64 else "reference"
        raise NotImplementedError(f"moe_experts: backend='stock' {found}; pass backend={cure!r}")


run, _operator, _backward_operator = operator("stock", _forward, _backward)
