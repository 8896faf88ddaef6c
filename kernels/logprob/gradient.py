"""Turns kept exponentials into the gradient of the raw scores, in place: one read and one write.

With z = x·softcap/temperature of raw scores x, p = E·exp(max z of the tile − max z − log_sum), and g and h the upstream
gradients of log-probability and entropy H,
    dz_j = ( g·[j = target] − p_j·(g + h·(log p_j + H)) ) / temperature · slope of the soft cap.
At the target p comes from the fp32 log-probability, because 1 − p cancels there where p is close to 1; the slope comes
from the target's own score, because the gradient there does not vanish where E underflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.logprob.forward import LN2, Scores

BLOCK_ROWS = 16
# A normal float32: Triton takes a smaller constant for float64 and would compute the logarithm in float64.
TINY = tl.constexpr(1.2e-38)


@triton.jit(
    do_not_specialize=["N", "temperature_stride"],
    do_not_specialize_on_alignment=["target_ptr", "temperature_ptr", "g_ptr", "h_ptr"],  # waves begin at any row
)
def gradient_kernel(
    kept_ptr,  # [N, V]
    tile_max_ptr,  # [tiles, N]
    row_max_ptr,  # [N], like the next ones
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    own_ptr,
    target_ptr,
    temperature_ptr,
    g_ptr,
    h_ptr,
    q_ptr,
    s_ptr,
    N,
    V,
    kept_stride,
    temperature_stride,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    APART: tl.constexpr,  # q and s are given
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(V, BLOCK_V)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    g = tl.load(g_ptr + row, inside, other=0.0)
    q = g
    idle = g == 0.0
    if APART:
        q, s = tl.load(q_ptr + row, inside, other=0.0), tl.load(s_ptr + row, inside, other=0.0)
        idle = idle & (q == 0.0) & (s == 0.0)
    if ENTROPY:
        h = tl.load(h_ptr + row, inside, other=0.0)
        idle = idle & (h == 0.0)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at = kept_ptr + row.to(tl.int64)[:, None] * kept_stride + column[None, :]
    there = inside[:, None] & (column < V)[None, :]
    e = tl.load(at, there, other=0.0).to(tl.float32)

    tile_max = tl.load(tile_max_ptr + tile.to(tl.int64) * N + row, inside, other=0.0)
    row_max = tl.load(row_max_ptr + row, inside, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, inside, other=0.0)
    logp = tl.load(logp_ptr + row, inside, other=0.0)
    temperature = tl.load(temperature_ptr + row * temperature_stride, inside, other=1.0)
    target = tl.load(target_ptr + row, inside, other=-1)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    hit = column[None, :] == target[:, None]
    factor = softcap / temperature
    shift = (tile_max - row_max) * factor - log_sum  # log p = log E + shift
    p = tl.where(hit, tl.exp(logp)[:, None], e * tl.exp(shift)[:, None])
    dz = tl.where(hit, g[:, None], 0.0)
    if ENTROPY or SOFTCAP:
        log_e = tl.log2(tl.maximum(e, TINY)) * LN2
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row, inside, other=0.0)
        # g + h·(log p + H) without the term h·log E, which differs from column to column
        of_row, of_target = q + h * (shift + entropy), q + h * (logp + entropy)
        dz -= p * tl.where(hit, of_target[:, None], of_row[:, None] + h[:, None] * log_e)
    else:
        dz -= p * q[:, None]
    if APART:
        dz += s[:, None]
    dz *= (1.0 / temperature)[:, None]
    if SOFTCAP:
        own = tl.load(own_ptr + row, inside, other=0.0)
        x = tl.where(hit, own[:, None], tile_max[:, None] + log_e * (temperature / softcap)[:, None])
        x = tl.minimum(tl.maximum(x, -1.0), 1.0)  # a banned token lies far below
        dz *= 1.0 - x * x
    dz = tl.where(idle[:, None], 0.0, dz)
    tl.store(at, dz.to(kept_ptr.dtype.element_ty), there)


def gradient_(
    found: Scores,
    target: torch.Tensor,
    temperature: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor | None,
    vocabulary: int,
    *,
    softcap: float | None = None,
    apart: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Turn ``found.kept`` into the gradient of the raw scores and return it as a view [n, vocabulary].

    ``target``, ``temperature``, ``softcap`` as in `scores`; ``g``, ``h`` [n] float32, contiguous: upstream gradients of
    log-probability and entropy (None: no entropy). Rows where both are 0 become exact zeros whatever they hold.
    ``apart``: (q, s) [n] float32 each, dz_j = ( g·[j = target] − q·p_j + s ) / temperature · slope, for losses of more
    than the log-probability; rows are then idle where all three are 0.
    """
    kept = found.kept
    n = kept.shape[0]
    if n == 0:
        return kept[:, :vocabulary]
    tiles = found.tile_max.shape[0]
    gradient_kernel[(triton.cdiv(n, BLOCK_ROWS) * tiles,)](
        kept, found.tile_max, found.row_max, found.log_sum, found.logp, found.entropy, found.own, target, temperature,
        g, g if h is None else h, *(apart or (g, g)), n, vocabulary, kept.stride(0), int(temperature.numel() > 1),
        1.0 if softcap is None else softcap, SOFTCAP=softcap is not None, ENTROPY=h is not None,
        APART=apart is not None, ROWS=BLOCK_ROWS, BLOCK_V=found.width, num_warps=4,
    )  # fmt: skip
    return kept[:, :vocabulary]
