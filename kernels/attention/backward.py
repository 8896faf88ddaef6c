"""Gradients of shared-prefix attention, from the output and its log-sum-exp.

With p = exp(score − lse) and δ = Σ dout·out per query: dv = pᵀ·dout, ds = p·(dout·vᵀ − δ), dq = ds·k, dk = dsᵀ·q, the
last two times the scale. One kernel owns tiles of queries (dq, and δ on the way), the other tiles of keys: those of a
prefix walk over the tiles of all queries that see them, found in a sorted list. No atomics, so bits repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_fast.kernels.attention.forward import LOG2E, load_rows, segment_of, shapes
from prism_fast.kernels.attention.tiles import Tile, cut, followers, tile_for


@triton.jit
def absorb_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, row, first, stop, k_stride, v_stride, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq (without the scale) plus what the keys [first, stop) add."""
    for at in range(first, stop, KEYS):
        column = at + tl.arange(0, KEYS)
        k = load_rows(k_ptr, column, stop, k_stride, D, BLOCK_D)
        v = load_rows(v_ptr, column, stop, v_stride, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale - lse[:, None]
        seen = (column < stop)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= row[:, None])
        p = tl.exp2(tl.where(seen, s, float("-inf")))
        ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["S", "scale"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr,
    dq_ptr,  # [T, Hq, D]
    delta_ptr,  # [T, Hq]
    tile_segment_ptr, tile_row_ptr, cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr,
    S, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.load(tile_segment_ptr + tl.program_id(0))
    if number >= S:
        return
    head = tl.program_id(1)
    begin = tl.load(tile_row_ptr + tl.program_id(0))
    start, stop, first, last = segment_of(number, S, cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr)
    row = begin + tl.arange(0, QUERIES)
    inside = row < stop
    q = load_rows(q_ptr + head * q_head, row, stop, q_row, D, BLOCK_D)
    do = load_rows(do_ptr + head * do_head, row, stop, do_row, D, BLOCK_D)
    out = load_rows(out_ptr + head * D, row, stop, HEADS * D, D, BLOCK_D)
    at = row.to(tl.int64) * HEADS + head
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, inside)
    lse = tl.load(lse_ptr + at, inside, other=0.0) * 1.4426950408889634
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    dq = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    dq = absorb_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, row, first, last, k_row, v_row, scale,
        CAUSAL=False, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    dq = absorb_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, row, start, tl.minimum(begin + QUERIES, stop), k_row, v_row, scale,
        CAUSAL=True, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dq *= scale * 0.6931471805599453
    tl.store(dq_ptr + at[:, None] * D + d[None, :], dq.to(dq_ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])


@triton.jit
def absorb_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, row, stop, column, q_row, do_row, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv plus what one tile of queries of one head adds."""
    inside = row < stop
    q = load_rows(q_ptr, row, stop, q_row, D, BLOCK_D)
    do = load_rows(do_ptr, row, stop, do_row, D, BLOCK_D)
    lse = tl.load(lse_ptr + row.to(tl.int64) * HEADS, inside, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + row.to(tl.int64) * HEADS, inside, other=0.0)
    s = tl.dot(k, q.T, input_precision=PRECISION) * scale - lse[None, :]  # [keys, queries]
    seen = inside[None, :]
    if CAUSAL:
        seen = seen & (column[:, None] <= row[None, :])
    p = tl.exp2(tl.where(seen, s, float("-inf")))
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["S", "scale"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, do_ptr, delta_ptr,
    dk_ptr,  # [T, Hk, D]
    dv_ptr,
    tile_segment_ptr, tile_row_ptr,  # of the keys
    query_segment_ptr, query_row_ptr, follower_ptr, follower_first_ptr,
    cu_ptr,
    S, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.load(tile_segment_ptr + tl.program_id(0))
    if number >= S:
        return
    head = tl.program_id(1)  # of the keys
    begin = tl.load(tile_row_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + number + 1)
    column = begin + tl.arange(0, KEYS)
    k = load_rows(k_ptr + head * k_head, column, stop, k_row, D, BLOCK_D)
    v = load_rows(v_ptr + head * v_head, column, stop, v_row, D, BLOCK_D)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    first = tl.load(follower_first_ptr + number)
    last = tl.load(follower_first_ptr + number + 1)
    for member in range(GROUP):
        query_head = head * GROUP + member
        q_head_ptr = q_ptr + query_head * q_head
        do_head_ptr = do_ptr + query_head * do_head
        for at in range(begin, stop, QUERIES):
            dk, dv = absorb_queries(
                dk, dv, k, v, q_head_ptr, do_head_ptr, lse_ptr + query_head, delta_ptr + query_head,
                at + tl.arange(0, QUERIES), stop, column, q_row, do_row, scale,
                CAUSAL=True, HEADS=HEADS, PRECISION=PRECISION, D=D, BLOCK_D=BLOCK_D,
            )  # fmt: skip
        for i in range(first, last):
            tile = tl.load(follower_ptr + i)
            end = tl.load(cu_ptr + tl.load(query_segment_ptr + tile) + 1)
            dk, dv = absorb_queries(
                dk, dv, k, v, q_head_ptr, do_head_ptr, lse_ptr + query_head, delta_ptr + query_head,
                tl.load(query_row_ptr + tile) + tl.arange(0, QUERIES), end, column, q_row, do_row, scale,
                CAUSAL=False, HEADS=HEADS, PRECISION=PRECISION, D=D, BLOCK_D=BLOCK_D,
            )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    at = (column.to(tl.int64) * (HEADS // GROUP) + head)[:, None] * D + d[None, :]
    inside = (column < stop)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + at, (dk * (scale * 0.6931471805599453)).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), inside)


def gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, 0 on padding. ``out`` and ``lse`` as :func:`attend` returns them; ``do`` [T,
    Hq, D] with heads of stride 1."""
    tile = tile or tile_for(q)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    segments = cu.shape[0] - 1
    if q.shape[0] == 0 or segments == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    queries, keys = (cut(cu, q.shape[0], n) for n in (tile.back_queries, tile.back_keys))
    strides = [n for x in (q, k, v, do) for n in x.stride()[:2]]
    seen_by = followers(queries, cu, prefix_start, prefix_len, branch_prefix)
    shared = {
        **shapes(q, k),
        "QUERIES": tile.back_queries,
        "KEYS": tile.back_keys,
        "num_warps": tile.back_warps,
        "num_stages": tile.back_stages,
    }
    queries_kernel[(queries.segment.shape[0], q.shape[1])](
        q, k, v, out, lse, do, dq, delta, *queries, cu, prefix_start, prefix_len, branch_prefix,
        segments, scale * LOG2E, *strides, **shared,
    )  # fmt: skip
    keys_kernel[(keys.segment.shape[0], k.shape[1])](
        q, k, v, lse, do, delta, dk, dv, *keys, *queries, *seen_by, cu,
        segments, scale * LOG2E, *strides, **shared,
    )  # fmt: skip
    return dq, dk, dv
