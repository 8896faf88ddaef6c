"""CUDA attention kernels played in plain PyTorch: their signatures, layouts and traps, any dtype, on the CPU. PyTorch's
own, those of the packages flash-attn, FlashAttention 3 (what PyTorch calls of it) and 4 (the same).

Rows outside of every sequence, and gradients of keys that have no queries, are left unwritten by the kernels: here they
are NaN. Values that a kernel would misread are refused.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prism_fast.ops import flash
from prism_fast.ops.stock import varlen
from prism_fast.ops.stock.varlen import Kernel

CHOICES = ("torch", "flash_attn", "fa3", "fa4")
PLAYED = ("flash", "efficient", "flash_attn", "fa3", "fa4")


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


def package_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    """``flash_attn::_flash_attn_varlen_forward``."""
    _flash_checks(q, k, v, max_seqlen_q)
    assert dropout_p == 0.0 and (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
    assert alibi_slopes is None and return_softmax is False
    sequences = pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, len(q), len(k))
    out, lse = attend(q, k, v, sequences, causal, softmax_scale)
    return out, lse.t().contiguous(), torch.empty(0), torch.zeros(2, dtype=torch.int64)


def package_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """``flash_attn::_flash_attn_varlen_backward``: writes dq, dk, dv."""
    _flash_checks(q, k, v, max_seqlen_q)
    assert dropout_p == 0.0 and (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
    assert alibi_slopes is None and rng_state.dtype == torch.int64 and rng_state.shape == (2,)
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    sequences = pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, len(q), len(k))
    for into, part in zip(
        (dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse.t(), sequences, causal, softmax_scale), strict=True
    ):
        assert into.is_contiguous() and into.shape == part.shape
        into.copy_(part)
    return torch.empty(0)


def fa3_forward(q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_k_new, used_q, used_k, max_q, max_k, *rest):
    """``flash_attn_3::fwd``; scale and causal are the 11th and 12th behind the bounds."""
    _flash_checks(q, k, v, 2)
    assert all(x is None for x in (k_new, v_new, qv, out, cu_k_new, used_q, used_k))
    scale, causal = rest[9:11]
    out, lse = attend(q, k, v, pairs(cu_q, cu_k, max_q, max_k, len(q), len(k)), causal, scale)
    return out, lse.t().contiguous(), torch.empty(0), torch.empty(0)


def fa3_backward(
    grad, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, used_q, used_k, max_q, max_k, scale, causal, *rest
):  # fmt: skip
    """``flash_attn_3::bwd``: writes dq, dk, dv."""
    _flash_checks(q, k, v, 2)
    assert used_q is None and used_k is None and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    sequences = pairs(cu_q, cu_k, max_q, max_k, len(q), len(k))
    for into, part in zip((dq, dk, dv), gradients(grad, q, k, v, out, lse.t(), sequences, causal, scale), strict=True):
        into.copy_(part)


def fa4_forward(q, k, v, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **rest):
    """``flash_attn.cute.interface._flash_attn_fwd``."""
    _flash_checks(q, k, v, 2)
    sequences = pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, len(q), len(k))
    out, lse = attend(q, k, v, sequences, causal, softmax_scale)
    return out, lse.t().contiguous()


def fa4_backward(q, k, v, out, grad, lse, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, **rest):
    """``flash_attn.cute.interface._flash_attn_bwd``, which is told no bounds."""
    _flash_checks(q, k, v, 2)
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    sequences = pairs(cu_seqlens_q, cu_seqlens_k, len(q), len(k), len(q), len(k))
    return gradients(grad, q, k, v, out, lse.t(), sequences, causal, softmax_scale)


@contextmanager
def on_the_card(choice: str, dtype: torch.dtype) -> Iterator[None]:
    """The real kernels of ``choice``; skips the test where this card or machine lacks them."""
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := flash.why_not(choice, device, dtype):
        pytest.skip(f"{choice}: {reason}")
    with flash.use_attention(choice, device, dtype):
        yield


def played_kernels(monkeypatch, name: str) -> Kernel:
    """``name`` (flash, efficient, flash_attn, fa3, fa4) on the CPU: our calls as they are, PyTorch's own code between
    them and FlashAttention 3 and 4 as it is, the kernels played."""
    for part in ("flash_forward", "flash_backward", "efficient_forward", "efficient_backward"):
        monkeypatch.setattr(varlen, f"_{part}", globals()[part])
    if name == "efficient":
        return Kernel(varlen.efficient_forward, varlen.efficient_backward)
    if name == "flash_attn":
        played = {"_flash_attn_varlen_forward": package_forward, "_flash_attn_varlen_backward": package_backward}
        monkeypatch.setattr(torch.ops, "flash_attn", SimpleNamespace(**played), raising=False)
        return Kernel(varlen.package_forward, varlen.package_backward)
    if name in ("fa3", "fa4"):
        adapter = importlib.import_module(f"torch.nn.attention._{name}")
        for direction in ("forward", "backward"):
            monkeypatch.setattr(adapter, f"_{name}_{direction}_support_error", lambda *x, **y: None)
        if name == "fa3":
            monkeypatch.setattr(adapter, "_FA3_CUDA_FWD", fa3_forward)
            monkeypatch.setattr(adapter, "_FA3_CUDA_BWD", fa3_backward)
            forward = adapter._fa3_flash_attention_forward_impl_default
        else:
            module = SimpleNamespace(_flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward)
            monkeypatch.setattr(adapter, "_FA4_MODULE_PATH", "played")
            monkeypatch.setattr(adapter, "_fa4_import_module", lambda path: module)
            forward = adapter._fa4_flash_attention_forward_impl
        monkeypatch.setattr(varlen, "_flash_forward", forward)
        monkeypatch.setattr(varlen, "_flash_backward", getattr(adapter, f"_{name}_flash_attention_backward_impl"))
    return Kernel(varlen.flash_forward, varlen.flash_backward)


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
