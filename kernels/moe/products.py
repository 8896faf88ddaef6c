"""Products of tokens with the weights of their experts, over slots: assignments sorted by expert.

Slot s belongs to token ``tokens[s]``, assignment (t, j) to slot ``slots[t, j]``, and expert e owns the slots
``offsets[e]`` to ``offsets[e + 1]``. The kernels read the offsets on the device; the card decides the number of
programs, and every program walks over the tiles of all experts in one order. Loads gather the rows. A tile's rows past
the last slot of an expert load its first slot again and are not stored. Columns past the end are masked: an index that
wraps around would hide from the compiler that neighbours are adjacent in memory, and every load would fetch one number
(seen in the machine code, as spilled registers).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, tile_position
from prism_fast.kernels.moe.tiles import Tile

RASTER = 8  # tile rows that share their columns of the weights while these are in L2


@triton.jit
def load_rows(rows, step, k, K, EVEN: tl.constexpr):
    """[rows, BLOCK_K] at ``rows + k · step``; zeros past the depth K."""
    if EVEN:
        return tl.load(rows + k[None, :] * step)
    return tl.load(rows + k[None, :] * step, (k < K)[None, :], other=0.0)


@triton.jit
def load_columns(columns, step, inside, k, K, EVEN: tl.constexpr):
    """[BLOCK_K, columns] at ``columns + k · step``; zeros past the depth K and where a column is not ``inside``."""
    mask = inside[None, :]
    if not EVEN:
        mask = mask & (k < K)[:, None]
    return tl.load(columns + k[:, None] * step, mask, other=0.0)


@triton.jit
def up_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [E, 2I, K]
    tokens_ptr,
    offsets_ptr,
    pre_ptr,  # [M, 2I] by slot
    act_ptr,  # [M, I] by slot
    K,
    inner,
    x_stride,
    x_step,
    weight_e,
    weight_n,
    weight_k,
    experts,
    STORE_PRE: tl.constexpr,
    STORE_ACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RASTER: tl.constexpr,
):
    """pre = x @ weightᵀ, act = silu(gate) · up: one program computes the gate and up columns of a tile."""
    columns = tl.cdiv(inner, BLOCK_N)
    tile = tl.program_id(0)
    first = 0  # tiles of earlier experts
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
            token = tl.load(tokens_ptr + slot).to(tl.int64)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < inner
            x_rows = x_ptr + token[:, None] * x_stride
            gate_columns = weight + n.to(tl.int64)[None, :] * weight_n
            up_columns = weight + (n + inner).to(tl.int64)[None, :] * weight_n
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(tl.cdiv(K, BLOCK_K)):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                x = load_rows(x_rows, x_step, k, K, EVEN_K)
                left = load_columns(gate_columns, weight_k, inside, k, K, EVEN_K)
                right = load_columns(up_columns, weight_k, inside, k, K, EVEN_K)
                gate = tl.dot(x, left, gate, input_precision=PRECISION)
                up = tl.dot(x, right, up, input_precision=PRECISION)
            kind = act_ptr.dtype.element_ty
            gate, up = gate.to(kind), up.to(kind)
            kept = there[:, None] & inside[None, :]
            if STORE_PRE:
                at = pre_ptr + slot[:, None] * (2 * inner) + n[None, :]
                tl.store(at, gate, kept)
                tl.store(at + inner, up, kept)
            if STORE_ACT:
                gate = gate.to(tl.float32)
                act = gate * tl.sigmoid(gate) * up.to(tl.float32)
                tl.store(act_ptr + slot[:, None] * inner + n[None, :], act.to(kind), kept)
            tile += PROGRAMS
        first += blocks * columns


@triton.jit
def slot_rows_kernel(
    x_ptr,  # [M, K] by slot, or [T, K] with GATHER
    weight_ptr,  # [E, N, K]
    tokens_ptr,
    offsets_ptr,
    out_ptr,  # [M, N] by slot
    K,
    N,
    x_stride,
    x_step,
    weight_e,
    weight_n,
    weight_k,
    experts,
    GATHER: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RASTER: tl.constexpr,
):
    """out[s] = x[s] @ weightᵀ of the slot's expert, with GATHER x[tokens[s]]."""
    columns = tl.cdiv(N, BLOCK_N)
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
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < N
            row = tl.load(tokens_ptr + slot).to(tl.int64) if GATHER else slot
            x_rows = x_ptr + row[:, None] * x_stride
            weight_columns = weight + n.to(tl.int64)[None, :] * weight_n
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(tl.cdiv(K, BLOCK_K)):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                x = load_rows(x_rows, x_step, k, K, EVEN_K)
                y = load_columns(weight_columns, weight_k, inside, k, K, EVEN_K)
                total = tl.dot(x, y, total, input_precision=PRECISION)
            at = out_ptr + slot[:, None] * N + n[None, :]
            tl.store(at, total.to(out_ptr.dtype.element_ty), there[:, None] & inside[None, :])
            tile += PROGRAMS
        first += blocks * columns


def up_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    tile: Tile,
    *,
    pre: torch.Tensor | None,
    act: torch.Tensor | None,
) -> None:
    """Write ``pre`` [M, 2I] and ``act`` [M, I], by slot and dense, whichever is given. x [T, H], weight [E, 2I, H]."""
    depth, inner, experts = x.shape[1], weight.shape[1] // 2, weight.shape[0]
    some = pre if act is None else act
    programs = card(x.device)[0]
    up_kernel[(programs,)](
        x, weight, tokens, offsets, some if pre is None else pre, some, depth, inner, *x.stride(), *weight.stride(),
        experts, STORE_PRE=pre is not None, STORE_ACT=act is not None,
        EVEN_K=depth % tile.k == 0, PRECISION=precision(x), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        PROGRAMS=programs, RASTER=RASTER, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def rows_product(
    x: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor | None, offsets: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """[M, N] by slot: ``x`` [M, K] by slot times the transposed weight [E, N, K] of its expert.

    With ``tokens`` [M], x [T, K] holds the rows of the tokens.
    """
    slots, (experts, width, depth) = (x if tokens is None else tokens).shape[0], weight.shape
    out, programs = x.new_empty((slots, width)), card(x.device)[0]
    slot_rows_kernel[(programs,)](
        x, weight, offsets if tokens is None else tokens, offsets, out, depth, width, *x.stride(), *weight.stride(),
        experts, GATHER=tokens is not None, EVEN_K=depth % tile.k == 0, PRECISION=precision(x), BLOCK_M=tile.m,
        BLOCK_N=tile.n, BLOCK_K=tile.k, PROGRAMS=programs, RASTER=RASTER, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def precision(x: torch.Tensor) -> str:
    """How ``tl.dot`` multiplies fp32 numbers; products of half-precision numbers are exact both ways."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
