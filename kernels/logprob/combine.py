"""Joins the partial results of each slice of the vocabulary into a row's log-probability and entropy.

With f = softcap/temperature, the factor of the raw scores x, `scores_kernel` writes for each row and each slice j
    m_j = max x,   s_j = Σ exp((x − m_j)·f),   u_j = Σ exp((x − m_j)·f)·(x − m_j)·f.
Then, with M = max_j m_j and d_j = (m_j − M)·f,
    S = Σ_j exp(d_j)·s_j,   U = Σ_j exp(d_j)·(u_j + d_j·s_j),
    log p(target) = (x_target − M)·f − log S,   entropy = log S − U/S.
Everything is relative to the maximum, so no large numbers are subtracted from each other; the maximum and the log of
the sum stay two numbers. The number of slices alone fixes the order of summation: the result does not depend on the
launch. A whole vocabulary has some hundred slices, so the kernel reads them in blocks, not one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK_ROWS = 32
BLOCK_SLICES = 32


class Combined(NamedTuple):
    """All ``[N]`` float32: raw row maximum M, log-sum relative to it, log-probability of the target, entropy (nats)."""

    row_max: torch.Tensor
    log_sum: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor


@triton.jit(do_not_specialize=["N", "SPLITS", "temperature_stride"], do_not_specialize_on_alignment=["temperature_ptr"])
def combine_kernel(
    m_ptr,  # [SPLITS, N]
    s_ptr,  # [SPLITS, N]
    u_ptr,  # [SPLITS, N]
    own_ptr,  # [N] raw score of the target
    temperature_ptr,  # [N] or [1]
    row_max_ptr,
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    N,
    SPLITS,
    temperature_stride,
    softcap,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    factor = softcap / tl.load(temperature_ptr + row * temperature_stride, inside, other=1.0)
    # An empty slice has m = -inf and s = 0. A row with empty slices alone gives NaN, not a plausible number.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, SPLITS, SLICES):
        j = first + tl.arange(0, SLICES)
        at = j.to(tl.int64)[:, None] * N.to(tl.int64) + row[None, :]
        m = tl.load(m_ptr + at, (j < SPLITS)[:, None] & inside[None, :], other=float("-inf"))
        top = tl.maximum(top, tl.max(m, 0))
    top = tl.where(inside, top, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SPLITS, SLICES):
        j = first + tl.arange(0, SLICES)
        at = j.to(tl.int64)[:, None] * N.to(tl.int64) + row[None, :]
        there = (j < SPLITS)[:, None] & inside[None, :]
        m = tl.load(m_ptr + at, there, other=float("-inf"))
        s = tl.load(s_ptr + at, there, other=0.0)
        u = tl.load(u_ptr + at, there, other=0.0)
        d = (m - top[None, :]) * factor[None, :]
        scale = tl.exp(d)
        total += tl.sum(scale * s, 0)
        moment += tl.sum(tl.where(m == float("-inf"), 0.0, scale * (u + d * s)), 0)
    total = tl.where(inside, total, 1.0)
    log_sum = tl.log(total)
    own = tl.load(own_ptr + row, inside, other=0.0)
    tl.store(row_max_ptr + row, top, inside)
    tl.store(log_sum_ptr + row, log_sum, inside)
    tl.store(logp_ptr + row, (own - top) * factor - log_sum, inside)
    tl.store(entropy_ptr + row, log_sum - moment / total, inside)


def combine_partials(
    m: torch.Tensor,
    s: torch.Tensor,
    u: torch.Tensor,
    own: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float | None = None,
) -> Combined:
    """Join slices ``m, s, u [SPLITS,N]`` and the target's raw score ``own [N]`` by the formulas above.

    ``temperature`` [N] or [1]; all of them float32 and contiguous. A NaN in ``own`` (a target outside the vocabulary)
    gives a NaN log-probability and leaves the entropy alone. Raises ValueError for other shapes, dtypes or layouts.
    """
    if m.ndim != 2 or m.shape[0] == 0 or s.shape != m.shape or u.shape != m.shape or own.shape != m.shape[1:]:
        shapes = [tuple(x.shape) for x in (m, s, u, own)]
        raise ValueError(f"combine_partials: shapes {shapes} are not three [SPLITS,N] with SPLITS >= 1 and one [N]")
    if tuple(temperature.shape) not in ((1,), tuple(own.shape)):
        shape = tuple(temperature.shape)
        raise ValueError(f"combine_partials: temperature {shape} is neither [1] nor [{own.shape[0]}]")
    for name, x in (("m", m), ("s", s), ("u", u), ("own", own), ("temperature", temperature)):
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"combine_partials: {name} must be contiguous float32, not {x.dtype} with {x.stride()}")
    splits, n = m.shape
    out = Combined(*(torch.empty_like(own) for _ in range(4)))
    if n:
        grid = (triton.cdiv(n, BLOCK_ROWS),)
        combine_kernel[grid](
            m, s, u, own, temperature, *out, n, splits, 0 if temperature.numel() == 1 else 1,
            1.0 if softcap is None else softcap, BLOCK=BLOCK_ROWS, SLICES=BLOCK_SLICES, num_warps=4,
        )  # fmt: skip
    return out
