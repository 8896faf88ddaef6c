"""Mixture of experts on the CPU: PyTorch's matrix products, and one compiled pass over memory for each step between.

The products take most of the time and are the same for every implementation; only memory traffic can be saved. Autograd
of a loop over experts keeps the gathered inputs and three activations per assignment, writes each expert's weight
gradient into a zero tensor of the size of all experts, and allocates fresh memory at every step. This implementation
keeps the up-projection alone, reuses one scratch buffer for all experts, and lets every product write its final result.

Semantics and validation: ``prism_fast.ops.moe_experts``; arithmetic: ``csrc/expert_rows.h``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from prism_fast.ops import native

from ..moe_operator import operator
from . import calls
from .route_experts import KERNEL

PRODUCTS = {torch.float32: "product_float32", torch.float64: "product_float64"}


def _experts(permutation: Tensor, tokens: Tensor, offsets: Tensor) -> list[tuple[int, slice, Tensor, Tensor]]:
    """(expert, its slots, tokens [n], assignments [n]) of every expert that has slots."""
    slots = [(e, slice(*border)) for e, border in enumerate(pairwise(offsets.tolist()))]
    return [(e, s, tokens[s], permutation[s]) for e, s in slots if s.start < s.stop]


def _fresh(x: Tensor) -> Tensor:
    """``x`` itself, with large pages asked for: the first write to fresh memory waits for each of its pages."""
    native.module().prefer_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def _scratch(experts: list[tuple[int, slice, Tensor, Tensor]], like: Tensor, *widths: int) -> list[Tensor]:
    """Buffers [rows of the largest expert, width] for each width, in one allocation."""
    rows = max((s.stop - s.start for _, s, _, _ in experts), default=0)
    room = _fresh(like.new_empty(rows * sum(widths)))
    return [x.view(rows, -1) for x in room.split([rows * w for w in widths])] if rows else []


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in ``out``; in float32 and float64 the same bits on any number of threads (``csrc/product.h``)."""
    if a.dtype not in PRODUCTS or not native.has_products():
        return torch.mm(a, b, out=out)
    if out.stride(1) != 1:
        if out.stride(0) == 1:
            _product(b.t(), a.t(), out.t())
            return out
        return out.copy_(_product(a, b, out.new_empty(out.shape)))
    (a, a_turned, a_line), (b, b_turned, b_line) = _lines(a), _lines(b)
    getattr(native.module(), PRODUCTS[a.dtype])(
        a=a.data_ptr(),
        a_turned=a_turned,
        a_line=a_line,
        b=b.data_ptr(),
        b_turned=b_turned,
        b_line=b_line,
        c=out.data_ptr(),
        c_line=max(out.stride(0), out.shape[1], 1),
        rows=out.shape[0],
        columns=out.shape[1],
        depth=a.shape[1],
        threads=torch.get_num_threads(),
    )
    return out


def _lines(x: Tensor) -> tuple[Tensor, bool, int]:
    """(matrix, whether its columns are contiguous and not its rows, distance between these in numbers)."""
    rows, columns = x.shape
    if x.stride(0) == 1 and (columns == 1 or x.stride(1) >= rows):
        return x, True, max(x.stride(1), rows, 1)
    if x.stride(1) != 1 or (rows > 1 and x.stride(0) < columns):
        x = x.contiguous()
    return x, False, max(x.stride(0), columns, 1)


def _kernel(name: str, like: Tensor):
    return getattr(native.module(), f"{name}_{KERNEL[like.dtype]}")


def _swiglu(pre: Tensor, act: Tensor) -> None:
    """act [n, I] = silu(gate) * up of pre [n, 2I]."""
    _kernel("swiglu", pre)(
        pre=pre.data_ptr(),
        row_stride=pre.stride(0),
        rows=act.shape[0],
        inner=act.shape[1],
        act=act.data_ptr(),
        threads=torch.get_num_threads(),
    )


def _swiglu_backward(
    pre: Tensor, mine: Tensor, weights: Tensor, d_act: Tensor, d_pre: Tensor | None, d_weights: Tensor | None
) -> None:
    """Write d_pre [n, 2I] and, at the assignments ``mine`` [n], d_weights. d_act [n, I] holds the upstream rows times
    down; the activation times the routing weight overwrites it."""
    _kernel("swiglu_backward", pre)(
        pre=pre.data_ptr(),
        row_stride=pre.stride(0),
        rows=d_act.shape[0],
        inner=d_act.shape[1],
        assignment=mine.data_ptr(),
        weights=weights.data_ptr(),
        d_act=d_act.data_ptr(),
        d_pre=calls.address(d_pre),
        d_weights=calls.address(d_weights),
        threads=torch.get_num_threads(),
    )


def _add_rows(source: Tensor, mine: Tensor, top_k: int, weights: Tensor | None, to: Tensor) -> None:
    """to [T, H] += weight * source [n, H] at the tokens of ``mine`` [n]. Calls come in the order of the experts, and
    rows of one token in order within an expert: the order of every sum is fixed."""
    _kernel("add_rows", source)(
        source=source.data_ptr(),
        rows=source.shape[0],
        width=source.shape[1],
        assignment=mine.data_ptr(),
        top_k=top_k,
        weights=calls.address(weights),
        to=to.data_ptr(),
        threads=torch.get_num_threads(),
    )


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    width, inner = down.shape[1:]
    top_k, kind = weights.shape[1], _sum_type(hidden)
    kept = _fresh(hidden.new_empty((permutation.shape[0] if keep else 0, 2 * inner)))
    out = hidden.new_zeros(hidden.shape, dtype=kind)
    # Autograd would refuse the writes into ``out=``, and autocast would change the dtypes that the caller chose.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        flat = weights.reshape(-1).to(kind)
        experts = _experts(permutation, tokens, offsets)
        scratch = _scratch(experts, hidden, width, inner, *[2 * inner] * (not keep))
        for e, own, token, mine in experts:
            x, act, *again = (room[: len(token)] for room in scratch)
            torch.index_select(hidden, 0, token, out=x)
            pre = _product(x, gate_up[e].t(), out=kept[own] if keep else again[0])
            _swiglu(pre, act)
            _add_rows(_product(act, down[e].t(), out=x), mine, top_k, flat, out)
    return out.to(hidden.dtype), kept


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
    want_hidden, want_gate_up, want_down, want_weights = wants
    (width, inner), nothing, kind = down.shape[1:], hidden.new_empty, _sum_type(hidden)
    want_pre = want_hidden or want_gate_up
    d_hidden = hidden.new_zeros(hidden.shape, dtype=kind) if want_hidden else nothing(0)
    d_gate_up = _fresh(torch.empty_like(gate_up)) if want_gate_up else nothing(0)
    d_down = _fresh(torch.empty_like(down)) if want_down else nothing(0)
    d_weights = hidden.new_empty(weights.shape, dtype=kind) if want_weights else nothing(0)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        flat = weights.reshape(-1).to(kind)
        experts = _experts(permutation, tokens, offsets)
        for e in set(range(len(down))).difference(e for e, *_ in experts):
            for gradient in (d_gate_up[e : e + 1], d_down[e : e + 1]):  # no product writes to these
                gradient.zero_()
        widths = (width, width, inner, *[2 * inner] * (want_pre + (kept.shape[0] == 0)))
        scratch = _scratch(experts, hidden, *widths)
        for e, own, token, mine in experts:
            x, g, d_act, *wide = (room[: len(token)] for room in scratch)
            torch.index_select(hidden, 0, token, out=x)
            torch.index_select(upstream, 0, token, out=g)
            pre = kept[own] if kept.shape[0] else _product(x, gate_up[e].t(), out=wide[-1])
            _product(g, down[e], out=d_act)  # before the routing weight
            d_pre = wide[0] if want_pre else None
            _swiglu_backward(pre, mine, flat, d_act, d_pre, d_weights if want_weights else None)
            if want_down:
                _product(g.t(), d_act, out=d_down[e])
            if want_gate_up:
                _product(d_pre.t(), x, out=d_gate_up[e])
            if want_hidden:
                _add_rows(_product(d_pre, gate_up[e], out=g), mine, weights.shape[1], None, d_hidden)
    return [d_hidden.to(hidden.dtype), d_gate_up, d_down, d_weights.to(weights.dtype)]


run, _operator, _backward_operator = operator("native", _forward, _backward)
