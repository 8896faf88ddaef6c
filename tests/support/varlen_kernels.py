"""PyTorch's CUDA attention kernels played in plain PyTorch: their signatures, layouts and traps, any dtype, on the CPU.

Rows outside of every sequence, and gradients of keys that have no queries, are left unwritten by the kernels: here they
are NaN. Values that a kernel would misread are refused.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def pairs(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, rows: int, keys: int) -> list[tuple[slice, slice]]:
    """Sequences that have queries."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert cu_q.shape == cu_k.shape and cu_q.shape[0] > 1
    assert (cu_q.diff() >= 0).all() and (cu_k.diff() >= 0).all() and cu_q[-1] <= rows and cu_k[-1] <= keys
    found = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if b > a:
            assert b - a <= max_q and 0 < d - c <= max_k, "longer than the bound the grid is cut by"
            found.append((slice(a, b), slice(c, d)))
    return found


def scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[H, n, m] of q [n, H, D] and k [m, Hk, D]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), -math.inf) if causal else s


def attend(q, k, v, sequences, causal, scale) -> tuple[Tensor, Tensor]:
    """(out [N, H, D], log-sum-exp [N, H])."""
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, dtype=q.dtype)
    for rows, keys in sequences:
        s = scores(q[rows], k[keys], causal, scale)
        value = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hnm,mhd->nhd", s.softmax(-1), value)
        lse[rows] = s.logsumexp(-1).t()
    return out, lse


def gradients(grad, q, k, v, out, lse, sequences, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' formula: probabilities from the log-sum-exp they are given, row sums from the output."""
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for rows, keys in sequences:
        p = (scores(q[rows], k[keys], causal, scale) - lse[rows].t()[..., None]).exp()
        key, value = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        delta = (grad[rows] * out[rows]).sum(-1).t()[..., None]
        ds = p * (torch.einsum("nhd,mhd->hnm", grad[rows], value) - delta) * scale
        dq[rows] = torch.einsum("hnm,mhd->nhd", ds, key)
        for into, part in (
            (dk, torch.einsum("hnm,nhd->mhd", ds, q[rows])),
            (dv, torch.einsum("hnm,nhd->mhd", p, grad[rows])),
        ):
            into[keys] = part.unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


def _flash_checks(q, k, v, max_q):
    assert q.dim() == 3 and all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    assert max_q > 1, "one query per sequence: the kernel would reshape the rows by the number of sequences"


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None):
    _flash_checks(q, k, v, max_q)
    assert dropout == 0.0 and debug is False
    out, lse = attend(q, k, v, pairs(cu_q, cu_k, max_q, max_k, len(q), len(k)), causal, scale)
    return out, lse.t().contiguous(), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale=None
):  # fmt: skip
    _flash_checks(q, k, v, max_q)
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    assert dropout == 0.0 and state.dtype == torch.uint64 and state.shape == (2,)
    sequences = pairs(cu_q, cu_k, max_q, max_k, len(q), len(k))
    return gradients(grad, q, k, v, out, lse.t(), sequences, causal, scale)


def _efficient_checks(q, k, v, max_q, max_k):
    assert q.dim() == 4 and q.shape[0] == k.shape[0] == 1 and q.shape[2:] == k.shape[2:] == v.shape[2:]
    assert 0 < max_q <= q.shape[1] and 0 < max_k <= k.shape[1]


def efficient_forward(
    q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask, compute_lse, *, scale=None
):  # fmt: skip
    _efficient_checks(q, k, v, max_q, max_k)
    assert bias is None and dropout == 0.0 and mask in (0, 1) and compute_lse
    sequences = pairs(cu_q, cu_k, max_q, max_k, q.shape[1], k.shape[1])
    out, flat = attend(q[0], k[0], v[0], sequences, mask == 1, scale)
    lse = torch.full((len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32), torch.nan, dtype=q.dtype)
    numbers = [i for i in range(len(cu_q) - 1) if cu_q[i + 1] > cu_q[i]]
    for number, (rows, _) in zip(numbers, sequences, strict=True):
        lse[number, :, : rows.stop - rows.start] = flat[rows].t()
        lse[number, :, rows.stop - rows.start :] = torch.inf
    return out[None], lse, torch.zeros(()), torch.zeros(()), max_q, max_k


def efficient_backward(
    grad, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask, bias_grad, *, scale=None
):  # fmt: skip
    _efficient_checks(q, k, v, max_q, max_k)
    assert bias is None and dropout == 0.0 and mask in (0, 1) and not bias_grad and out.is_contiguous()
    assert lse.shape == (len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32)
    sequences = pairs(cu_q, cu_k, max_q, max_k, q.shape[1], k.shape[1])
    flat = torch.full(q.shape[1:3], torch.nan, dtype=q.dtype)
    numbers = [i for i in range(len(cu_q) - 1) if cu_q[i + 1] > cu_q[i]]
    for number, (rows, _) in zip(numbers, sequences, strict=True):
        assert (lse[number, :, rows.stop - rows.start :] == torch.inf).all()
        flat[rows] = lse[number, :, : rows.stop - rows.start].t()
    found = gradients(grad[0], q[0], k[0], v[0], out[0], flat, sequences, mask == 1, scale)
    return *(x[None] for x in found), torch.empty(())
