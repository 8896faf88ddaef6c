"""Output and log-sum-exp of shared-prefix attention.

A program owns a tile of queries of one segment and one head. It walks over two ranges of keys, each given by two
scalars: the whole prefix of its segment, then its own segment up to the diagonal. Only tiles around the diagonal need a
mask of two dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_fast.kernels.attention.lists import Lists, plan_for, view_lists
from prism_fast.kernels.attention.tiles import MAX_WIDTH, Tile, block_width, tile_for
from prism_fast.kernels.launch import on_device

LOG2E = 1.4426950408889634


@triton.jit
def segment_of(number, S, cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr):
    """(first token, past the last, first token of the prefix, past its last); no prefix: the last two are equal."""
    start = tl.load(cu_ptr + number)
    stop = tl.load(cu_ptr + number + 1)
    prefix = tl.load(branch_prefix_ptr + number)
    has = prefix >= 0
    first = tl.load(prefix_start_ptr + prefix, has, other=0)
    return start, stop, first, first + tl.load(prefix_len_ptr + prefix, has, other=0)


@triton.jit
def load_rows(ptr, row, stop, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; 0 for rows from ``stop`` on and columns from D on."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + row.to(tl.int64)[:, None] * stride + d[None, :], (row < stop)[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def tile_of(i, prefixes, first, last, start, stop, KEYS: tl.constexpr):
    """(first key, end of its range) of the i-th tile that all rows see: ``prefixes`` tiles of the prefix [first, last),
    then those of the own segment [start, stop)."""
    in_prefix = i < prefixes
    return tl.where(in_prefix, first + i * KEYS, start + (i - prefixes) * KEYS), tl.where(in_prefix, last, stop)


@triton.jit
def absorb(
    q, top, total, out, k_ptr, v_ptr, row, at, stop, k_stride, v_stride, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, keys [at, min(at + KEYS, stop)): new maximum, sum and unnormalised output."""
    column = at + tl.arange(0, KEYS)
    k = load_rows(k_ptr, column, stop, k_stride, D, BLOCK_D)
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale  # in units of log 2
    seen = (column < stop)[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None])
    s = tl.where(seen, s, float("-inf"))
    # Every row sees the first key of the first tile, so its maximum is finite from there on.
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(v_ptr, column, stop, v_stride, D, BLOCK_D)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return new, total, out


@triton.jit(do_not_specialize=["S", "T", "scale"])
def attend_kernel(
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    v_ptr,
    out_ptr,  # [T, Hq, D]
    lse_ptr,  # [Hq, T] natural logarithm
    tile_ptr,  # [2, tiles] segment and first token
    cu_ptr,
    prefix_start_ptr,
    prefix_len_ptr,
    branch_prefix_ptr,
    S,
    T,
    scale,  # times log2(e)
    q_row, q_head, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.load(tile_ptr + tl.program_id(0))
    if number >= S:
        return
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(tile_ptr + tl.num_programs(0) + tl.program_id(0))
    start, stop, first, last = segment_of(number, S, cu_ptr, prefix_start_ptr, prefix_len_ptr, branch_prefix_ptr)
    row = begin + tl.arange(0, QUERIES)
    q = load_rows(q_ptr + head * q_head, row, stop, q_row, D, BLOCK_D)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    # Keys that all rows see, then those around the diagonal.
    prefixes, full = tl.cdiv(last - first, KEYS), (begin - start) // KEYS
    for i in range(prefixes + full):
        at, end = tile_of(i, prefixes, first, last, start, stop, KEYS)
        top, total, out = absorb(
            q, top, total, out, k_ptr, v_ptr, row, at, end, k_row, v_row, scale,
            CAUSAL=False, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    for at in range(start + full * KEYS, tl.minimum(begin + QUERIES, stop), KEYS):
        top, total, out = absorb(
            q, top, total, out, k_ptr, v_ptr, row, at, stop, k_row, v_row, scale,
            CAUSAL=True, PRECISION=PRECISION, KEYS=KEYS, D=D, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    inside = row < stop
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + head * T + row, (top + tl.log2(total)) * 0.6931471805599453, inside)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    lists: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] in the dtype of ``q`` and log-sum-exp [Hq, T] float32; both 0 on padding, and NaN if the lists
    say that the layout does not fit the row.

    q [T, Hq, D], k and v [T, Hk, D] with rows of heads of stride 1, D <= 128; the layout as in ``PrefixLayout``,
    contiguous; ``lists`` by ``make_lists`` from the same. Raises NotImplementedError for a card without a tile.
    """
    tile = tile or tile_for(q)
    tokens, heads = q.shape[:2]
    found = view_lists(plan_for(q, k, cu, tile), lists)
    out, lse = (poisoned(q, found, *x) for x in ((q.shape, q.dtype), ((heads, tokens), torch.float32)))
    segments = cu.shape[0] - 1
    if tokens and segments:
        with on_device(q):
            attend_kernel[(found.forward.shape[1], heads)](
                q, k, v, out, lse, found.forward, cu, prefix_start, prefix_len, branch_prefix,
                segments, tokens, scale * LOG2E, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                **shapes(q, k), QUERIES=tile.queries, KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


def poisoned(like: Tensor, lists: Lists, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output before any program writes to it: 0, or NaN if the layout does not fit the row."""
    return like.new_empty(shape, dtype=dtype).copy_(torch.where(lists.bad[0] != 0, torch.nan, 0.0))


def shapes(q: Tensor, k: Tensor) -> dict[str, object]:
    """Compile-time arguments that all kernels here share. Raises NotImplementedError for heads wider than MAX_WIDTH."""
    heads, width = q.shape[1:]
    if width > MAX_WIDTH:
        raise NotImplementedError(f"shared-prefix attention: heads of {width}, at most {MAX_WIDTH} are supported")
    return {
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "D": width,
        "BLOCK_D": block_width(width),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
