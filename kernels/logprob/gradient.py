"""Kept exponentials become the gradient of the raw scores, in place, one read and one write.

With p = E·exp(tile_max − row_max − log_sum), g and h the upstream gradients of log-probability and entropy H,
    dz_j = ( g·[j = target] − p_j·(g + h·(log p_j + H)) ) / temperature · slope of the soft cap.
At the target p comes from the fp32 log-probability, because 1 − p cancels there when the policy is sure of itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.logprob.forward import Scores

BLOCK_ROWS = 16
TINY = tl.constexpr(1e-38)


@triton.jit(
    do_not_specialize=["N", "heat_stride"],
    do_not_specialize_on_alignment=["target_ptr", "heat_ptr", "g_ptr", "h_ptr"],  # waves begin at any row
)
def gradient_kernel(
    kept_ptr,  # [N, V]
    tile_max_ptr,  # [tiles, N]
    row_max_ptr,  # [N] and so on
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    target_ptr,
    heat_ptr,
    g_ptr,
    h_ptr,
    N,
    V,
    kept_stride,
    heat_stride,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(V, BLOCK_V)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    g = tl.load(g_ptr + row, inside, other=0.0)
    idle = g == 0.0
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
    heat = tl.load(heat_ptr + row * heat_stride, inside, other=1.0)
    target = tl.load(target_ptr + row, inside, other=-1)
    hit = column[None, :] == target[:, None]
    shift = (tile_max - row_max) - log_sum  # log p = log E + shift
    p = tl.where(hit, tl.exp(logp)[:, None], e * tl.exp(shift)[:, None])
    dz = tl.where(hit, g[:, None], 0.0)
    if ENTROPY or SOFTCAP:
        log_p = tl.where(hit, logp[:, None], tl.log(tl.maximum(e, TINY)) + shift[:, None])
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row, inside, other=0.0)
        dz -= p * (g[:, None] + h[:, None] * (log_p + entropy[:, None]))
    else:
        dz -= p * g[:, None]
    dz *= (1.0 / heat)[:, None]
    if SOFTCAP:
        capped = (log_p + (log_sum + row_max)[:, None]) * (heat / softcap)[:, None]
        dz *= 1.0 - capped * capped
    dz = tl.where(idle[:, None], 0.0, dz)
    tl.store(at, dz.to(kept_ptr.dtype.element_ty), there)


def gradient_(
    found: Scores,
    target: torch.Tensor,
    heat: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor | None,
    vocabulary: int,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Turn ``found.kept`` into the gradient of the raw scores and return it as a view [n, vocabulary].

    ``target``, ``heat``, ``softcap`` as in `scores`; ``g``, ``h`` [n] float32, contiguous: upstream gradients of
    log-probability and entropy (None: no entropy). Rows where both are 0 become exact zeros whatever they hold.
    """
    kept = found.kept
    n = kept.shape[0]
    if n == 0:
        return kept[:, :vocabulary]
    tiles = found.tile_max.shape[0]
    gradient_kernel[(triton.cdiv(n, BLOCK_ROWS) * tiles,)](
        kept, found.tile_max, found.row_max, found.log_sum, found.logp, found.entropy, target, heat, g,
        g if h is None else h, n, vocabulary, kept.stride(0), 0 if heat.numel() == 1 else 1,
        1.0 if softcap is None else softcap, SOFTCAP=softcap is not None, ENTROPY=h is not None,
        ROWS=BLOCK_ROWS, BLOCK_V=found.width, num_warps=4,
    )  # fmt: skip
    return kept[:, :vocabulary]
