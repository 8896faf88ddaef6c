"""Gradients of the experts' weights: sums over slots; the plan as in `products`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, tile_position
from prism_fast.kernels.moe.products import RASTER, precision
from prism_fast.kernels.moe.tiles import Tile


@triton.jit
def slot_columns_kernel(
    a_ptr,  # [M, R] by slot, or [T, R] with GATHER_A
    b_ptr,  # [M, N] by slot, or [T, N] with GATHER_B
    tokens_ptr,
    offsets_ptr,
    out_ptr,  # [E, R, N]
    R,
    N,
    a_stride,
    a_step,
    b_stride,
    b_step,
    out_e,
    out_r,
    out_n,
    experts,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RASTER: tl.constexpr,
):
    """out[e] = Σ over the slots of expert e of aᵀ b, in fp32, slots in order; zeros for an expert without slots."""
    rows = tl.cdiv(R, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), experts * rows * columns, PROGRAMS):
        e = tile // (rows * columns)
        row, column = tile_position(tile % (rows * columns), rows, columns, RASTER)
        begin = tl.load(offsets_ptr + e)
        end = tl.load(offsets_ptr + e + 1)
        r = row * BLOCK_M + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        r_there, n_there = r < R, n < N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(end - begin, BLOCK_K)):
            slot = begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
            a_mask = (slot < end)[None, :]  # b repeats the last slot past the end: the zeros of a suffice
            slot = tl.minimum(slot, end - 1).to(tl.int64)
            a_row, b_row = slot, slot
            if GATHER_A:
                a_row = tl.load(tokens_ptr + slot).to(tl.int64)
            if GATHER_B:
                b_row = tl.load(tokens_ptr + slot).to(tl.int64)
            if not EVEN_R:
                a_mask = a_mask & r_there[:, None]
            a = tl.load(a_ptr + a_row[None, :] * a_stride + r[:, None] * a_step, a_mask, other=0.0)
            b_at = b_ptr + b_row[:, None] * b_stride + n[None, :] * b_step
            b = tl.load(b_at) if EVEN_N else tl.load(b_at, n_there[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        at = out_ptr + tl.cast(e, tl.int64) * out_e + r.to(tl.int64)[:, None] * out_r + n.to(tl.int64)[None, :] * out_n
        tl.store(at, total.to(out_ptr.dtype.element_ty), r_there[:, None] & n_there[None, :])


def weight_gradient(
    like: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    tile: Tile,
    *,
    gather_a: bool,
    gather_b: bool,
) -> torch.Tensor:
    """[E, R, N] in the strides of ``like``, of a [M, R] by slot (with ``gather_a`` [T, R]) and b [M, N] likewise."""
    experts, rows, width = like.shape
    out, programs = torch.empty_like(like), card(a.device)[0]
    slot_columns_kernel[(programs,)](
        a, b, tokens, offsets, out, rows, width, *a.stride(), *b.stride(), *out.stride(), experts,
        GATHER_A=gather_a, GATHER_B=gather_b, EVEN_R=rows % tile.m == 0, EVEN_N=width % tile.n == 0,
        PRECISION=precision(a), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, PROGRAMS=programs, RASTER=RASTER,
        num_warps=tile.warps,
        # Loads of the tokens come before those of the gathered rows and take every other stage.
        num_stages=2 * tile.stages - 1 if gather_a or gather_b else tile.stages,
    )  # fmt: skip
    return out
