"""The two products of a head's backward pass over chosen rows and chosen blocks of the vocabulary.

cuBLAS reads no counts from the device. These kernels do: how many rows matter, which ones, and, per block of them,
which tiles of the vocabulary. Nothing of it passes through the host; launches are sized by the upper bound.

``order`` [n] int32 holds the rows that matter first; ``count`` [1] int32 says how many they are. A block is `BLOCK`
consecutive entries of ``order``. With lists, block i visits the tiles ``ids[i, :counts[i]]``, each ``width`` columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, tile_position

BLOCK = 128  # rows of a block


class Lists(NamedTuple):
    """Which (block of rows, tile of the vocabulary) pairs to visit, seen from both sides. All int32."""

    tile_counts: torch.Tensor  # [blocks]
    tile_ids: torch.Tensor  # [blocks, tiles]
    block_counts: torch.Tensor  # [tiles]
    block_ids: torch.Tensor  # [tiles, blocks]
    width: int  # columns of a tile, a multiple of 64


@triton.jit
def rows_kernel(
    dz_ptr,  # [N, V]
    weight_ptr,  # [V, H]
    out_ptr,  # [N, H]
    order_ptr,
    count_ptr,
    counts_ptr,
    ids_ptr,
    V,
    H,
    dz_stride,
    weight_stride,
    out_stride,
    tiles,
    LISTED: tl.constexpr,
    PER: tl.constexpr,  # steps per tile of a list
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out[r] = dz[r] @ weight for the rows r that matter."""
    count = tl.load(count_ptr)
    blocks = tl.cdiv(count, BLOCK_R)
    columns = tl.cdiv(H, BLOCK_H)
    for tile in range(tl.program_id(0), blocks * columns, PROGRAMS):
        block, column = tile_position(tile, blocks, columns, 8)
        i = block * BLOCK_R + tl.arange(0, BLOCK_R)
        there = i < count
        row = tl.load(order_ptr + i, there, other=0).to(tl.int64)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        steps = tl.cdiv(V, BLOCK_V)
        if LISTED:
            steps = tl.load(counts_ptr + block) * PER
        total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for step in range(steps):
            at = step
            if LISTED:
                at = tl.load(ids_ptr + block * tiles + step // PER) * PER + step % PER
            v = at * BLOCK_V + tl.arange(0, BLOCK_V)
            x = tl.load(dz_ptr + row[:, None] * dz_stride + v[None, :], there[:, None] & (v < V)[None, :], other=0.0)
            w = tl.load(
                weight_ptr + v.to(tl.int64)[:, None] * weight_stride + h[None, :],
                (v < V)[:, None] & (h < H)[None, :],
                other=0.0,
            )
            total = tl.dot(x, w, total, input_precision=PRECISION)
        tl.store(
            out_ptr + row[:, None] * out_stride + h[None, :],
            total.to(out_ptr.dtype.element_ty),
            there[:, None] & (h < H)[None, :],
        )


@triton.jit
def columns_kernel(
    dz_ptr,  # [N, V]
    hidden_ptr,  # [N, H]
    out_ptr,  # [V, H]
    order_ptr,
    count_ptr,
    counts_ptr,
    ids_ptr,
    V,
    H,
    dz_stride,
    hidden_stride,
    out_stride,
    blocks,
    width,
    LISTED: tl.constexpr,
    PER: tl.constexpr,  # steps per block of a list
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out (+)= dz[r].T @ hidden[r] summed over the rows r that matter, in the order of ``order``."""
    count = tl.load(count_ptr)
    tiles_v = tl.cdiv(V, BLOCK_V)
    columns = tl.cdiv(H, BLOCK_H)
    for tile in range(tl.program_id(0), tiles_v * columns, PROGRAMS):
        tile_v, column = tile_position(tile, tiles_v, columns, 8)
        v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        listed = tile_v * BLOCK_V // width
        steps = tl.cdiv(count, BLOCK_R)
        if LISTED:
            steps = tl.load(counts_ptr + listed) * PER
        total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for step in range(steps):
            at = step
            if LISTED:
                at = tl.load(ids_ptr + listed * blocks + step // PER) * PER + step % PER
            i = at * BLOCK_R + tl.arange(0, BLOCK_R)
            there = i < count
            row = tl.load(order_ptr + i, there, other=0).to(tl.int64)
            d = tl.load(dz_ptr + row[:, None] * dz_stride + v[None, :], there[:, None] & (v < V)[None, :], other=0.0)
            x = tl.load(
                hidden_ptr + row[:, None] * hidden_stride + h[None, :], there[:, None] & (h < H)[None, :], other=0.0
            )
            total = tl.dot(tl.trans(d), x, total, input_precision=PRECISION)
        at = out_ptr + v.to(tl.int64)[:, None] * out_stride + h[None, :]
        inside = (v < V)[:, None] & (h < H)[None, :]
        if ACCUMULATE:
            total += tl.load(at, inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(out_ptr.dtype.element_ty), inside)


def compact(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [n] int32: the active rows, ascending, then rows that nobody reads; count [1] int32)."""
    n = active.shape[0]
    place = torch.where(active, active.cumsum(0) - 1, n)
    order = torch.zeros(n + 1, dtype=torch.int32, device=active.device)
    order.scatter_(0, place, torch.arange(n, dtype=torch.int32, device=active.device))
    return order[:n], active.sum(dtype=torch.int32)[None]


def lists(wanted: torch.Tensor, width: int) -> Lists:
    """From ``wanted`` [blocks, tiles] bool."""

    def packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.sort(x.logical_not().to(torch.uint8), dim=1, stable=True).indices
        return x.sum(1, dtype=torch.int32), ids.to(torch.int32).contiguous()

    return Lists(*packed(wanted), *packed(wanted.t()), width)


def product_of_rows(
    out: torch.Tensor,
    dz: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    lists: Lists | None = None,
) -> None:
    """Write ``dz [n,V] @ weight [V,H]`` into the rows of ``out`` [n,H] that matter; the others stay as they are."""
    n, (vocabulary, width) = dz.shape[0], weight.shape
    if 0 in (n, vocabulary, width):
        return
    block_v, block_h, programs = *_depth(dz.dtype), card(dz.device)[0]
    grid = (min(programs, triton.cdiv(n, BLOCK) * triton.cdiv(width, block_h)),)
    rows_kernel[grid](
        dz, weight, out, order, count, count if lists is None else lists.tile_counts,
        count if lists is None else lists.tile_ids, vocabulary, width, dz.stride(0), weight.stride(0), out.stride(0),
        1 if lists is None else lists.tile_ids.shape[1], LISTED=lists is not None,
        PER=1 if lists is None else lists.width // block_v, PRECISION=_precision(dz.dtype),
        BLOCK_R=BLOCK, BLOCK_H=block_h, BLOCK_V=block_v, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip


def product_of_columns(
    out: torch.Tensor,
    dz: torch.Tensor,
    hidden: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    lists: Lists | None = None,
    *,
    accumulate: bool = False,
) -> None:
    """``out`` [V,H] (+)= ``dz[r].T @ hidden[r]`` over the rows that matter."""
    n, vocabulary, width = dz.shape[0], dz.shape[1], hidden.shape[1]
    if n == 0 and not accumulate:
        out.zero_()
    if 0 in (n, vocabulary, width):
        return
    block_r, block_h, programs = *_depth(dz.dtype), card(dz.device)[0]
    block_v = 128 if lists is None else min(128, lists.width)
    grid = (min(programs, triton.cdiv(vocabulary, block_v) * triton.cdiv(width, block_h)),)
    columns_kernel[grid](
        dz, hidden, out, order, count, count if lists is None else lists.block_counts,
        count if lists is None else lists.block_ids, vocabulary, width, dz.stride(0), hidden.stride(0), out.stride(0),
        1 if lists is None else lists.block_ids.shape[1], block_v if lists is None else lists.width,
        LISTED=lists is not None, PER=1 if lists is None else BLOCK // block_r, ACCUMULATE=accumulate,
        PRECISION=_precision(dz.dtype), BLOCK_R=block_r, BLOCK_H=block_h, BLOCK_V=block_v, PROGRAMS=programs,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def _depth(dtype: torch.dtype) -> tuple[int, int]:
    """(depth of a step, columns of an output tile)."""
    return (16, 32) if dtype == torch.float32 else (64, 128)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
