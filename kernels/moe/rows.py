"""The steps of the experts between their products: one pass over memory each, in fp32, for every backend of products.

``tokens``, ``slots`` and ``permutation`` are a plan's (`prism_fast.ops.results.Routing`). Rows by slot are dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import on_device as on_device


@triton.jit(do_not_specialize=["slots"])
def gather_rows_kernel(
    x_ptr,  # [T, N]
    tokens_ptr,
    out_ptr,  # [M, N] by slot
    slots,
    N,
    stride,
    step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[s] = x[tokens[s]]."""
    s = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (s < slots)[:, None] & (n < N)[None, :]
    token = tl.load(tokens_ptr + s, s < slots, other=0).to(tl.int64)
    row = tl.load(x_ptr + token[:, None] * stride + n[None, :] * step, there, other=0.0)
    tl.store(out_ptr + s.to(tl.int64)[:, None] * N + n[None, :], row, there)


@triton.jit(do_not_specialize=["slots"])
def swiglu_kernel(
    pre_ptr,  # [M, 2I]
    act_ptr,  # [M, I]
    slots,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """act = silu(gate) · up."""
    s = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (s < slots)[:, None] & (n < inner)[None, :]
    at = s.to(tl.int64)[:, None] * inner + n[None, :]
    pre = pre_ptr + at + s.to(tl.int64)[:, None] * inner
    gate = tl.load(pre, there, other=0.0).to(tl.float32)
    up = tl.load(pre + inner, there, other=0.0).to(tl.float32)
    tl.store(act_ptr + at, (gate * tl.sigmoid(gate) * up).to(act_ptr.dtype.element_ty), there)


@triton.jit(do_not_specialize=["slots"])
def swiglu_gradient_kernel(
    d_ptr,  # [M, I] read: upstream rows times the down-projection; written: weighted activations
    pre_ptr,  # [M, 2I]
    weights_ptr,  # [M] routing weights by assignment
    permutation_ptr,  # the assignment of a slot
    d_pre_ptr,  # [M, 2I]
    share_ptr,  # [M] by assignment
    slots,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With d, gate and up of a slot and its routing weight w, the gradients are
    w·d·up·silu'(gate) of gate, w·d·silu(gate) of up, Σ d·silu(gate)·up of w; w·silu(gate)·up overwrites d.
    """
    s = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = s < slots
    assignment = tl.load(permutation_ptr + s, here, other=0)
    weight = tl.load(weights_ptr + assignment, here, other=0.0)[:, None]
    kind = d_pre_ptr.dtype.element_ty
    row = s.to(tl.int64)[:, None] * inner
    share = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = here[:, None] & (n < inner)[None, :]
        own = d_ptr + row + n[None, :]
        wide = 2 * row + n[None, :]
        d = tl.load(own, there, other=0.0).to(tl.float32)
        gate = tl.load(pre_ptr + wide, there, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + wide + inner, there, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        share += d * silu * up
        tl.store(own, (weight * silu * up).to(kind), there)
        d *= weight
        tl.store(d_pre_ptr + wide + inner, (d * silu).to(kind), there)
        tl.store(d_pre_ptr + wide, (d * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), there)
    tl.store(share_ptr + assignment, tl.sum(share, 1), here)


@triton.jit(do_not_specialize=["T"])
def combine_rows_kernel(
    rows_ptr,  # [M, N] by slot
    slots_ptr,  # [T, top_k]
    weights_ptr,  # [T, top_k]
    out_ptr,  # [T, N]
    T,
    N,
    top_k,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = Σ_j weights[t, j] · rows[slots[t, j]] in fp32, j in order."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (t < T)[:, None] & (n < N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(top_k):
        assignment = t.to(tl.int64) * top_k + j
        slot = tl.load(slots_ptr + assignment, t < T, other=0).to(tl.int64)
        part = tl.load(rows_ptr + slot[:, None] * N + n[None, :], there, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights_ptr + assignment, t < T, other=0.0)[:, None]
        total += part
    tl.store(out_ptr + t.to(tl.int64)[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), there)


@triton.jit
def clear_idle_kernel(
    out_ptr,  # [E, size]
    offsets_ptr,
    size,
    BLOCK: tl.constexpr,
):
    """Zeros for the experts without slots; the others are left alone."""
    e = tl.program_id(0)
    if tl.load(offsets_ptr + e) == tl.load(offsets_ptr + e + 1):
        for first in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            zero = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
            tl.store(out_ptr + tl.cast(e, tl.int64) * size + at, zero, at < size)


def gather_rows(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[M, N] by slot: the rows of ``x`` [T, N] at ``tokens`` [M]."""
    slots, width = tokens.shape[0], x.shape[1]
    out = x.new_empty((slots, width))
    block_m, block_n = 8, 512
    gather_rows_kernel[(triton.cdiv(slots, block_m), triton.cdiv(width, block_n))](
        x, tokens, out, slots, width, *x.stride(), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )
    return out


def swiglu(pre: torch.Tensor) -> torch.Tensor:
    """[M, I] = silu(gate) · up of ``pre`` [M, 2I], gate before up."""
    slots, inner = pre.shape[0], pre.shape[1] // 2
    act = pre.new_empty((slots, inner))
    block_m, block_n = 4, 512
    swiglu_kernel[(triton.cdiv(slots, block_m), triton.cdiv(inner, block_n))](
        pre, act, slots, inner, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )
    return act


def swiglu_gradient(
    d: torch.Tensor, pre: torch.Tensor, weights: torch.Tensor, permutation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of ``pre`` [M, 2I], gradient of ``weights``); the weighted activations [M, I] overwrite ``d``.

    d [M, I]: upstream rows times the down-projection, before the routing weight. weights [T, top_k] fp32, dense.
    """
    slots, inner = d.shape
    d_pre, share = torch.empty_like(pre), torch.empty_like(weights)
    block_m, block_n = 2, 512
    swiglu_gradient_kernel[(triton.cdiv(slots, block_m),)](
        d, pre, weights, permutation, d_pre, share, slots, inner, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )
    return d_pre, share


def combine_rows(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """[T, N] from ``rows`` [M, N] by slot at ``slots`` [T, top_k], weighted by ``weights`` [T, top_k] fp32 if given."""
    (tokens, top_k), width = slots.shape, rows.shape[1]
    out = rows.new_empty((tokens, width))
    block_m, block_n = 8, 256
    combine_rows_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(width, block_n))](
        rows, slots, rows if weights is None else weights, out, tokens, width, top_k, WEIGHTED=weights is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


def clear_idle(out: torch.Tensor, offsets: torch.Tensor) -> None:
    """Zeros in ``out`` [E, R, N] for experts without slots; each expert's [R, N] is dense in memory."""
    size, block = out.shape[1] * out.shape[2], 4096
    programs = min(64, triton.cdiv(size, block))
    clear_idle_kernel[(out.shape[0], programs)](out, offsets, size, BLOCK=block, num_warps=8)
