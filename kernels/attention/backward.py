"""Gradients of shared-prefix attention, from the output and its log-sum-exp.

With p = exp(score − lse) and δ = Σ dout·out per query: dv = pᵀ·dout, ds = p·(dout·vᵀ − δ), dq = ds·k, dk = dsᵀ·q, the
last two times the scale. A program of `queries_kernel` owns a tile of queries and computes dq and δ. A program of
`keys_kernel` owns a tile of keys, or a part of its work: for keys of a prefix it walks over the tiles of all queries
that see the prefix, which it finds in a sorted list. `sums_kernel` adds the parts up in order. No atomics, so bits
repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prism_fast.kernels.attention.forward import LOG2E, load_rows, poisoned, segment_of, shapes, tile_of
from prism_fast.kernels.attention.lists import plan_for, view_lists
from prism_fast.kernels.attention.tiles import Tile, tile_for
from prism_fast.kernels.launch import on_device

SUM_ROWS = 16  # keys per program of `sums_kernel`


@triton.jit
def absorb_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, row, at, stop, k_stride, v_stride, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq (without the scale) plus the part of the keys [at, min(at + KEYS, stop))."""
    column = at + tl.arange(0, KEYS)
    k = load_rows(k_ptr, column, stop, k_stride, D, BLOCK_D)
    v = load_rows(v_ptr, column, stop, v_stride, D, BLOCK_D)
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale - lse[:, None]
    seen = (column < stop)[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None])
    p = tl.exp2(tl.where(seen, s, float("-inf")))
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["S", "T", "scale"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, do_ptr,
    dq_ptr,  # [T, Hq, D]
    sums_ptr,  # [Hq, tiles, 2, QUERIES] log-sum-exp (times log2(e); infinite outside) and delta of each row
    tile_ptr,  # [2, tiles] segment and first token
    cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr,
    S, T, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.load(tile_ptr + tl.program_id(0))
    if number >= S:
        return
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(tile_ptr + tl.num_programs(0) + tl.program_id(0))
    start, stop, first, last = segment_of(number, S, cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr)
    row = begin + tl.arange(0, QUERIES)
    inside = row < stop
    q = load_rows(q_ptr + head * q_head, row, stop, q_row, D, BLOCK_D)
    do = load_rows(do_ptr + head * do_head, row, stop, do_row, D, BLOCK_D)
    out = load_rows(out_ptr + head * D, row, stop, HEADS * D, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    # An infinite log-sum-exp gives rows outside the probability 0, in both kernels.
    lse = tl.load(lse_ptr + head * T + row, inside, other=float("inf")) * 1.4426950408889634
    sums_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * (2 * QUERIES) + tl.arange(0, QUERIES)
    tl.store(sums_ptr, lse)
    tl.store(sums_ptr + QUERIES, delta)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    dq = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    prefixes, full = tl.cdiv(last - first, KEYS), (begin - start) // KEYS
    for i in range(prefixes + full):
        at, end = tile_of(i, prefixes, first, last, start, stop, KEYS)
        dq = absorb_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, row, at, end, k_row, v_row, scale,
            CAUSAL=False, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    for at in range(start + full * KEYS, tl.minimum(begin + QUERIES, stop), KEYS):
        dq = absorb_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, row, at, stop, k_row, v_row, scale,
            CAUSAL=True, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dq *= scale * 0.6931471805599453
    at = row.to(tl.int64) * HEADS + head
    tl.store(dq_ptr + at[:, None] * D + d[None, :], dq.to(dq_ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])


@triton.jit
def absorb_queries(
    dk, dv, k, v, q_ptr, do_ptr, sums_ptr, row, stop, ahead, q_row, do_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv plus the part of one tile of queries of one head, whose first row comes ``ahead``
    tokens after the first key."""
    row += tl.arange(0, QUERIES)
    q = load_rows(q_ptr, row, stop, q_row, D, BLOCK_D)
    do = load_rows(do_ptr, row, stop, do_row, D, BLOCK_D)
    lse = tl.load(sums_ptr + tl.arange(0, QUERIES))
    delta = tl.load(sums_ptr + QUERIES + tl.arange(0, QUERIES))
    s = tl.dot(k, q.T, input_precision=PRECISION) * scale - lse[None, :]  # [keys, queries]
    if CAUSAL:
        key = tl.arange(0, k.shape[0])
        s = tl.where(key[:, None] <= ahead + tl.arange(0, QUERIES)[None, :], s, float("-inf"))
    p = tl.exp2(s)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tiles", "S", "scale"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,
    sums_ptr,  # [Hq, tiles, 2, QUERIES] log-sum-exp and delta
    dk_ptr,  # [T, Hk, D]
    dv_ptr,
    partial_ptr,  # [slots, Hk, 2, KEYS, BLOCK_D] float32: dk and dv of parts
    part_ptr,  # [parts, 8] see Lists
    seer_ptr,  # [seers, 3] number, first token and end of query tiles
    cu_ptr,
    tiles, S, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    part_ptr += tl.program_id(0) // KEY_HEADS * 8
    number = tl.load(part_ptr)
    if number >= S:
        return
    head = tl.program_id(0) % KEY_HEADS  # of the keys; fastest, so that long parts start together
    begin = tl.load(part_ptr + 1)
    stop = tl.load(cu_ptr + number + 1)
    row = tl.arange(0, KEYS)
    k = load_rows(k_ptr + head.to(tl.int64) * k_head, begin + row, stop, k_row, D, BLOCK_D)
    v = load_rows(v_ptr + head.to(tl.int64) * v_head, begin + row, stop, v_row, D, BLOCK_D)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    # Queries at the same tokens as the keys.
    diagonal, first, last = tl.load(part_ptr + 2), tl.load(part_ptr + 3), tl.load(part_ptr + 4)
    for member in range(GROUP):
        query_head = (head * GROUP + member).to(tl.int64)
        for i in tl.range(first, last, num_stages=1):  # two tiles: a pipeline would cost registers and gain nothing
            sums_at = (query_head * tiles + diagonal + i) * (2 * QUERIES)
            dk, dv = absorb_queries(
                dk, dv, k, v, q_ptr + query_head * q_head, do_ptr + query_head * do_head, sums_ptr + sums_at,
                begin + i * QUERIES, stop, i * QUERIES, q_row, do_row, scale,
                CAUSAL=True, PRECISION=PRECISION, D=D, BLOCK_D=BLOCK_D, QUERIES=QUERIES,
            )  # fmt: skip
    # Queries that see all of the keys: those of branches, and later ones of the own segment.
    first, last, slot = tl.load(part_ptr + 5), tl.load(part_ptr + 6), tl.load(part_ptr + 7)
    for member in range(GROUP):
        query_head = (head * GROUP + member).to(tl.int64)
        for i in range(first, last):
            sums_at = (query_head * tiles + tl.load(seer_ptr + 3 * i)) * (2 * QUERIES)
            dk, dv = absorb_queries(
                dk, dv, k, v, q_ptr + query_head * q_head, do_ptr + query_head * do_head, sums_ptr + sums_at,
                tl.load(seer_ptr + 3 * i + 1), tl.load(seer_ptr + 3 * i + 2), 0, q_row, do_row, scale,
                CAUSAL=False, PRECISION=PRECISION, D=D, BLOCK_D=BLOCK_D, QUERIES=QUERIES,
            )  # fmt: skip
    dk *= scale * 0.6931471805599453
    d = tl.arange(0, BLOCK_D)
    if slot < 0:
        at = row[:, None] * (KEY_HEADS * D) + d[None, :]
        inside = (row < stop - begin)[:, None] & (d < D)[None, :]
        first_at = (begin.to(tl.int64) * KEY_HEADS + head) * D
        tl.store(dk_ptr + first_at + at, dk.to(dk_ptr.dtype.element_ty), inside)
        tl.store(dv_ptr + first_at + at, dv.to(dv_ptr.dtype.element_ty), inside)
    else:
        partial_ptr += (slot.to(tl.int64) * KEY_HEADS + head) * (2 * KEYS * BLOCK_D)
        place = row[:, None] * BLOCK_D + d[None, :]
        tl.store(partial_ptr + place, dk)
        tl.store(partial_ptr + KEYS * BLOCK_D + place, dv)


@triton.jit(do_not_specialize=["S"])
def sums_kernel(
    dk_ptr, dv_ptr, partial_ptr,
    tile_ptr,  # [tiles, 4] segment and first token of the keys; first slot, number of slots
    cu_ptr,
    S,
    KEY_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of key tiles whose work was cut into parts: the sums of the parts, in order."""
    tile_ptr += tl.program_id(0) * 4
    number = tl.load(tile_ptr)
    if number >= S:
        return
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    dk = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dv = tl.zeros((ROWS, BLOCK_D), tl.float32)
    first = tl.load(tile_ptr + 2).to(tl.int64)
    place = row[:, None] * BLOCK_D + d[None, :]
    for i in range(tl.load(tile_ptr + 3)):
        part_ptr = partial_ptr + ((first + i) * KEY_HEADS + head) * (2 * KEYS * BLOCK_D)
        dk += tl.load(part_ptr + place)
        dv += tl.load(part_ptr + KEYS * BLOCK_D + place)
    column = tl.load(tile_ptr + 1) + row
    at = (column.to(tl.int64) * KEY_HEADS + head)[:, None] * D + d[None, :]
    inside = (column < tl.load(cu_ptr + number + 1))[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), inside)
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
    lists: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, 0 on padding, and NaN if the lists say that the layout does not fit the row.

    ``lists``, ``out`` and ``lse`` as for and from :func:`attend`; ``do`` [T, Hq, D] with heads of stride 1. Takes at
    most ``lists.PARTIAL_BYTES`` of memory for sums of parts.
    """
    tile = tile or tile_for(q)
    (tokens, heads, width), key_heads, segments = q.shape, k.shape[1], cu.shape[0] - 1
    plan = plan_for(q, k, cu, tile)
    found = view_lists(plan, lists)
    dq, dk, dv = (poisoned(x, found, x.shape, x.dtype) for x in (q, k, v))
    if tokens == 0 or segments == 0:
        return dq, dk, dv
    constants = shapes(q, k)
    sums = lse.new_empty((heads, found.queries.shape[1], 2, tile.back_queries))
    partial = lse.new_empty((plan.slots, key_heads, 2, tile.back_keys, constants["BLOCK_D"]))
    strides = [n for x in (q, k, v, do) for n in x.stride()[:2]]
    shared = {
        **constants,
        "QUERIES": tile.back_queries,
        "KEYS": tile.back_keys,
        "num_warps": tile.back_warps,
        "num_stages": tile.back_stages,
    }
    with on_device(q):
        queries_kernel[(found.queries.shape[1], heads)](
            q, k, v, out, lse, do, dq, sums, found.queries, cu, prefix_start, prefix_len, branch_prefix,
            segments, tokens, scale * LOG2E, *strides, **shared,
        )  # fmt: skip
        keys_kernel[(found.parts.shape[0] * key_heads,)](
            q, k, v, do, sums, dk, dv, partial, found.parts, found.seers, cu,
            sums.shape[1], segments, scale * LOG2E, *strides, **shared,
        )  # fmt: skip
        rows = min(SUM_ROWS, tile.back_keys)
        sums_kernel[(found.sums.shape[0], key_heads, tile.back_keys // rows)](
            dk, dv, partial, found.sums, cu, segments,
            KEY_HEADS=key_heads, D=width, BLOCK_D=constants["BLOCK_D"], KEYS=tile.back_keys, ROWS=rows,
        )  # fmt: skip
    return dq, dk, dv
