"""Scores, their statistics and (on request) their exponentials in one pass over the output matrix.

A program computes tiles of hidden·Wᵀ with fp32 accumulators and derives everything from them before it rounds: per row
and tile the maximum m, Σ e and Σ e·(z−m) of e = exp(z−m), and the score of the target if the tile holds its column.
`combine` joins the tiles. Backward needs e, kept relative to the tile's own maximum: its relative error is that of one
rounding to the operands' dtype, whatever the size of the scores.

The kernel compares and subtracts raw scores, x = product + bias, or x = tanh((product + bias) / softcap), and scales
only the difference, z−m = (x−m)·softcap/temperature. That saves a multiplication per score, and backward finds the
slope of the soft cap from x without a second rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, scratch, tile_position
from prism_fast.kernels.logprob.combine import Combined, combine_partials
from prism_fast.kernels.logprob.tiles import FEW_ROWS, Tile, retune, tile_for

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Replaces -inf (a column outside the matrix, a banned token): finite, also after scaling, so that no inf - inf and no
# 0 · inf can arise.
LOWEST = tl.constexpr(-1e25)


class Scores(NamedTuple):
    """Statistics of ``n`` rows, for backward too. float32 ``[n]`` unless said otherwise."""

    row_max: torch.Tensor  # of the raw scores
    log_sum: torch.Tensor  # log Σ exp(z - max z)
    logp: torch.Tensor  # of the target; NaN where the target is no column of the matrix
    entropy: torch.Tensor  # nats
    own: torch.Tensor  # raw score of the target, or NaN
    kept: torch.Tensor | None  # [n, >= V] in the operands' dtype, e^(z - tile max); columns past V mean nothing
    tile_max: torch.Tensor  # [tiles, n] of the raw scores
    width: int  # columns of a tile


@triton.jit
def tanh(x):
    """By the exponential; near 0, where that cancels, by a polynomial (relative error 3e-9 below 0.6)."""
    t = x * x
    p = -0.33333298002 + t * (0.13331924125 + t * (-0.05378383015 + t * (0.02079597127 - t * 0.00589515766)))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = 1.0 - 2.0 * e / (1.0 + e)  # near 1 only this subtraction rounds: the quotient is small
    return tl.where(t < 0.36, x + x * t * p, tl.where(x < 0, -far, far))


@triton.jit
def raw(z, bias_ptr, first, V, inverse, low, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WIDTH: tl.constexpr):
    """Products -> raw scores; columns outside the matrix and banned ones become `LOWEST` or ``low`` [rows]."""
    column = first + tl.arange(0, WIDTH)
    if HAS_BIAS:  # only a bias can ban a token; columns outside are banned with it
        z += tl.load(bias_ptr + column, column < V, other=float("-inf")).to(tl.float32)[None, :]
    x = z
    if SOFTCAP:
        x = tanh(z * inverse)
    if HAS_BIAS and SOFTCAP:
        x = tl.where(z < LOWEST, low[:, None], x)
    elif HAS_BIAS:
        x = tl.maximum(x, low[:, None], propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.where((column < V)[None, :], x, LOWEST)
    return x


@triton.jit
def chosen(x, target, first, WIDTH: tl.constexpr):
    """[rows] score of each row's target, 0 where it is not among these columns."""
    column = first + tl.arange(0, WIDTH)
    return tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)


@triton.jit
def exponentials(x, m, factor, kept, n, v, ENTROPY: tl.constexpr, BASE2: tl.constexpr):
    """Σ e and Σ e·d of e = exp(d), d = (x − m)·factor; e goes to the descriptor ``kept`` if there is one."""
    if BASE2:  # saves a multiplication and is exact enough beside half-precision operands
        d = (x - m[:, None]) * (factor * LOG2E)[:, None]
        e = tl.exp2(d)
    else:
        d = (x - m[:, None]) * factor[:, None]
        e = tl.exp(d)
    total = tl.sum(e, 1)
    moment = total
    if ENTROPY:
        moment = tl.sum(e * d, 1)
        if BASE2:
            moment *= LN2
    if kept is not None:
        kept.store([n, v], e.to(kept.dtype))
    return total, moment


# Waves begin at any row: Triton must not compile the kernel anew for each alignment of the tensors by row.
@triton.jit(
    do_not_specialize=["N", "temperature_stride"], do_not_specialize_on_alignment=["target_ptr", "temperature_ptr"]
)
def scores_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    target_ptr,  # [N]
    temperature_ptr,  # [N] or [1] float32 temperature
    kept_ptr,  # [N, V]
    m_ptr,  # [tiles, N], also s, u
    s_ptr,
    u_ptr,
    own_ptr,  # [N]
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    kept_stride,
    temperature_stride,  # 0 for a scalar
    softcap,  # 1 without
    inverse,  # 1 / softcap
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    BASE2: tl.constexpr = PRECISION != "ieee"
    PART: tl.constexpr = BLOCK_V // 2 if SPLIT else BLOCK_V
    hidden = tl.make_tensor_descriptor(hidden_ptr, [N, H], [hidden_stride, 1], [BLOCK_N, BLOCK_H])
    weight = tl.make_tensor_descriptor(weight_ptr, [V, H], [weight_stride, 1], [BLOCK_V, BLOCK_H])
    if KEEP:
        kept = tl.make_tensor_descriptor(kept_ptr, [N, V], [kept_stride, 1], [BLOCK_N, PART])
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    steps = tl.cdiv(H, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, PROGRAMS, flatten=True):
        tile_n, tile_v = tile_position(tile, tiles_n, tiles_v, GROUP)
        n = tile_n * BLOCK_N
        v = tile_v * BLOCK_V
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for step in range(steps):
            h = step * BLOCK_H
            z = tl.dot(hidden.load([n, h]), weight.load([v, h]).T, z, input_precision=PRECISION)

        row = n + tl.arange(0, BLOCK_N)
        inside = row < N
        factor = softcap / tl.load(temperature_ptr + row * temperature_stride, inside, other=1.0)
        # The bound of `raw` where there is a bias, a number per row: `LOWEST` itself costs one register too many there.
        low = tl.maximum(LOWEST / factor, -3e38)
        target = tl.load(target_ptr + row, inside, other=-1)
        target = tl.where((target >= v) & (target < v + BLOCK_V) & (target < V), target - v, -1).to(tl.int32)
        if SPLIT:
            # One half after the other: the scores of a whole tile and their exponentials together spill registers.
            halves = tl.permute(tl.reshape(z, (BLOCK_N, 2, PART)), (0, 2, 1))
            left, right = tl.split(halves)
            left = raw(left, bias_ptr, v, V, inverse, low, HAS_BIAS, SOFTCAP, PART)
            right = raw(right, bias_ptr, v + PART, V, inverse, low, HAS_BIAS, SOFTCAP, PART)
            m = tl.maximum(tl.max(left, 1), tl.max(right, 1))
            at_target = chosen(left, target, 0, PART) + chosen(right, target, PART, PART)
            total, moment = exponentials(left, m, factor, kept if KEEP else None, n, v, ENTROPY, BASE2)
            total_right, moment_right = exponentials(
                right, m, factor, kept if KEEP else None, n, v + PART, ENTROPY, BASE2
            )
            total += total_right
            moment += moment_right
        else:
            x = raw(z, bias_ptr, v, V, inverse, low, HAS_BIAS, SOFTCAP, PART)
            m = tl.max(x, 1)
            at_target = chosen(x, target, 0, PART)
            total, moment = exponentials(x, m, factor, kept if KEEP else None, n, v, ENTROPY, BASE2)
        tl.store(own_ptr + row, at_target, inside & (target >= 0))
        slot = tile_v.to(tl.int64) * N + row
        tl.store(m_ptr + slot, m, inside)
        tl.store(s_ptr + slot, total, inside)
        if ENTROPY:
            tl.store(u_ptr + slot, moment, inside)


def scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    keep: torch.Tensor | bool = False,
    tile: Tile | None = None,
) -> Scores:
    """Statistics of the rows ``cap(hidden [n,H] @ weight [V,H].T + bias) / temperature``.

    ``hidden`` and ``weight`` in bf16, fp16 or fp32 with rows that start at multiples of 16 bytes; ``target`` [n] int64
    or int32; ``temperature`` [n] or [1] float32, contiguous. ``keep``: whether to keep the exponentials, or a tensor of
    `keep_buffer` to write them to. ``tile`` defaults to the table of the card.

    Raises ValueError for rows that the kernel cannot address, NotImplementedError for a dtype or card it does not know.
    """
    for name, x in (("hidden", hidden), ("weight", weight)):
        _addressable(name, x)
    n = hidden.shape[0]
    programs, capability = card(hidden.device)
    kept = keep_buffer(n, weight.shape[0], hidden) if keep is True else (None if keep is False else keep)
    operands = (hidden, weight, target, temperature, bias, softcap, entropy, kept, programs)
    if tile is None:
        rich = softcap is not None
        if n and hidden.is_cuda:
            retune(capability, n, hidden.dtype, rich, lambda candidate: _launch(*operands, candidate))
        tile = tile_for(capability, n, hidden.dtype, rich)
    m, s, u, own = _launch(*operands, tile)
    if n == 0:
        return Scores(*(own.clone() for _ in range(5)), kept, m, tile.v)
    joined: Combined = combine_partials(m, s, u, own, temperature, softcap)
    return Scores(*joined, own, kept, m, tile.v)


def _launch(
    hidden, weight, target, temperature, bias, softcap, entropy, kept, programs, tile
) -> tuple[torch.Tensor, ...]:
    """(m, s, u [tiles, n], raw score of the target [n]); without entropy u is s, a placeholder."""
    (n, width), vocabulary = hidden.shape, weight.shape[0]
    tiles = triton.cdiv(vocabulary, tile.v)
    fresh = {"dtype": torch.float32, "device": hidden.device}
    m, s = torch.empty((tiles, n), **fresh), torch.empty((tiles, n), **fresh)
    u = torch.empty((tiles, n), **fresh) if entropy else s
    own = torch.full((n,), float("nan"), **fresh)
    count = triton.cdiv(n, tile.n) * tiles
    if count == 0:
        return m, s, u, own
    cap = 1.0 if softcap is None else softcap
    triton.set_allocator(scratch)
    scores_kernel[(min(programs, count),)](
        hidden, weight, hidden if bias is None else bias, target, temperature, hidden if kept is None else kept,
        m, s, u, own, n, vocabulary, width, hidden.stride(0), weight.stride(0),
        width if kept is None else kept.stride(0), 0 if temperature.numel() == 1 else 1, cap, 1.0 / cap,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, ENTROPY=entropy, KEEP=kept is not None,
        # The default would round fp32 operands to ten bits.
        PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
        SPLIT=tile.split, BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_H=tile.h, GROUP=tile.group, PROGRAMS=programs,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return m, s, u, own


def keep_buffer(n: int, vocabulary: int, like: torch.Tensor) -> torch.Tensor:
    """[n, >= vocabulary] for kept exponentials; rows start at multiples of 128 bytes, for tensor copies and cuBLAS."""
    unit = 128 // like.element_size()
    return like.new_empty((n, triton.cdiv(vocabulary, unit) * unit))


def tile_width(hidden: torch.Tensor, rich: bool) -> int:
    """Columns of a tile of `scores` on this card, for any number of rows; ``rich``: with a soft cap."""
    return tile_for(card(hidden.device)[1], FEW_ROWS + 1, hidden.dtype, rich).v


def _addressable(name: str, x: torch.Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise NotImplementedError(f"{name}: {x.dtype} has no kernel; use bfloat16, float16, float32 or the reference")
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        raise ValueError(f"{name}: rows must be contiguous and start at multiples of 16 bytes; strides {x.stride()}")
