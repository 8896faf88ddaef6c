"""Backward products of the experts; slots and walk as in `forward`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, tile_position
from prism_fast.kernels.moe.forward import RASTER, load_columns, load_rows, precision
from prism_fast.kernels.moe.tiles import Tile


@triton.jit
def act_gradient_kernel(
    g_ptr,  # [T, K] upstream gradient
    weight_ptr,  # [E, K, I] the down-projection
    pre_ptr,  # [M, 2I] by slot
    weights_ptr,  # [M] routing weights by assignment
    permutation_ptr,
    offsets_ptr,
    d_pre_ptr,  # [M, 2I] by slot
    act_ptr,  # [M, I] by slot: weighted activations
    share_ptr,  # [columns, M] by assignment: parts of the gradient of the routing weight
    K,
    inner,
    top_k,
    slots,
    g_stride,
    g_step,
    weight_e,
    weight_k,
    weight_n,
    experts,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RASTER: tl.constexpr,
):
    """With d = g @ weight, gate and up of a slot and its routing weight w:
    gradient of gate w·d·up·silu'(gate), of up w·d·silu(gate), of w Σ d·silu(gate)·up."""
    columns = tl.cdiv(inner, BLOCK_N)
    tile = tl.program_id(0)
    first = 0
    for e in range(experts):
        begin = tl.load(offsets_ptr + e)
        end = tl.load(offsets_ptr + e + 1)
        blocks = tl.cdiv(end - begin, BLOCK_M)
        weight = weight_ptr + tl.cast(e, tl.int64) * weight_e
        while tile < first + blocks * columns:
            block, column = tile_position(tile - first, blocks, columns, RASTER)
            slot = begin + block * BLOCK_M + tl.arange(0, BLOCK_M)
            there = slot < end
            slot = tl.where(there, slot, begin).to(tl.int64)
            assignment = tl.load(permutation_ptr + slot)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < inner
            g_rows = g_ptr + (assignment // top_k)[:, None] * g_stride
            weight_columns = weight + n.to(tl.int64)[None, :] * weight_n
            d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(tl.cdiv(K, BLOCK_K)):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                g = load_rows(g_rows, g_step, k, K, EVEN_K)
                w = load_columns(weight_columns, weight_k, inside, k, K, EVEN_K)
                d = tl.dot(g, w, d, input_precision=PRECISION)
            kept = there[:, None] & inside[None, :]
            at = slot[:, None] * (2 * inner) + n[None, :]
            gate = tl.load(pre_ptr + at, kept, other=0.0).to(tl.float32)
            up = tl.load(pre_ptr + at + inner, kept, other=0.0).to(tl.float32)
            factor = tl.load(weights_ptr + assignment)[:, None]
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            kind = d_pre_ptr.dtype.element_ty
            share = tl.sum(d * silu * up, 1)  # columns past the end hold up = 0
            tl.store(share_ptr + tl.cast(column, tl.int64) * slots + assignment, share, there)
            tl.store(act_ptr + slot[:, None] * inner + n[None, :], (factor * silu * up).to(kind), kept)
            d *= factor
            tl.store(d_pre_ptr + at + inner, (d * silu).to(kind), kept)
            tl.store(d_pre_ptr + at, (d * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), kept)
            tile += PROGRAMS
        first += blocks * columns


@triton.jit
def slot_columns_kernel(
    a_ptr,  # [M, R] by slot, or [T, R] with GATHER_A
    b_ptr,  # [M, N] by slot, or [T, N] with GATHER_B
    permutation_ptr,
    offsets_ptr,
    out_ptr,  # [E, R, N]
    R,
    N,
    top_k,
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RASTER: tl.constexpr,
):
    """out[e] = Σ over the slots of expert e of aᵀ b, in fp32, slots in order; zeros where there are none."""
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
            there = slot < end
            slot = tl.where(there, slot, begin).to(tl.int64)
            a_row, b_row = slot, slot
            if GATHER_A:
                a_row = tl.load(permutation_ptr + slot) // top_k
            if GATHER_B:
                b_row = tl.load(permutation_ptr + slot) // top_k
            a = tl.load(
                a_ptr + a_row[None, :] * a_stride + r[:, None] * a_step, there[None, :] & r_there[:, None], other=0.0
            )
            b = tl.load(
                b_ptr + b_row[:, None] * b_stride + n[None, :] * b_step, there[:, None] & n_there[None, :], other=0.0
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
        at = out_ptr + tl.cast(e, tl.int64) * out_e + r.to(tl.int64)[:, None] * out_r + n.to(tl.int64)[None, :] * out_n
        tl.store(at, total.to(out_ptr.dtype.element_ty), r_there[:, None] & n_there[None, :])


def act_gradient(
    g: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor,
    weights: torch.Tensor,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of ``pre`` [M, 2I], weighted activations [M, I], gradient of ``weights`` [T, top_k]).

    g [T, H], weight [E, H, I], pre [M, 2I] by slot, weights [T, top_k] fp32; all but g and weight dense.
    """
    slots, (experts, depth, inner) = pre.shape[0], weight.shape
    columns, programs = triton.cdiv(inner, tile.n), card(g.device)[0]
    d_pre, act = torch.empty_like(pre), pre.new_empty((slots, inner))
    share = torch.empty((columns, slots), dtype=torch.float32, device=g.device)
    act_gradient_kernel[(programs,)](
        g, weight, pre, weights, permutation, offsets, d_pre, act, share, depth, inner, weights.shape[1], slots,
        g.stride(0), g.stride(1), *weight.stride(), experts, EVEN_K=depth % tile.k == 0, PRECISION=precision(g),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, PROGRAMS=programs, RASTER=RASTER, num_stages=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return d_pre, act, share.sum(0).view(weights.shape)


def weight_gradient(
    like: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    permutation: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    tile: Tile,
    *,
    gather_a: bool,
    gather_b: bool,
) -> torch.Tensor:
    """[E, R, N] in the strides of ``like``: a [M, R] by slot (or [T, R], gathered) and b [M, N] likewise."""
    experts, rows, width = like.shape
    out, programs = torch.empty_like(like), card(a.device)[0]
    slot_columns_kernel[(programs,)](
        a, b, permutation, offsets, out, rows, width, top_k, *a.stride(), *b.stride(), *out.stride(), experts,
        GATHER_A=gather_a, GATHER_B=gather_b, PRECISION=precision(a), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        PROGRAMS=programs, RASTER=RASTER, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
