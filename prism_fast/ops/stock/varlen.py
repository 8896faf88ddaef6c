"""Attention over packed sequences of different lengths on a GPU: the kernels, and an op of one call.

``ops.flash`` chooses the FlashAttention for half precision: PyTorch's operators (its own kernels, or FlashAttention 3
or 4 in their place), or those of the package flash-attn. Float32 and cards before 8.0 use PyTorch's memory-efficient
kernel. All of them leave rows outside of every sequence uninitialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import flash
from ..prefix_operator import attention_operator, dense_heads
from ..reference.segments import sequence_of_token

_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_efficient_forward = torch.ops.aten._efficient_attention_forward
_efficient_backward = torch.ops.aten._efficient_attention_backward
MAX_FLASH_WIDTH = 256
NO_EXTRAS = -1, -1, 0.0, None  # of flash-attn: window to the left and right, soft cap, slopes of a bias
CAUSAL = {False: 0, True: 1}  # mask types of the memory-efficient kernel


class Sequences(NamedTuple):
    """Pairs of a sequence of queries and the sequence of keys that it sees. Offsets int32 [B + 1]; ``max_…`` bound the
    lengths in pairs that have queries."""

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool


class Kernel(NamedTuple):
    """``forward(q, k, v, sequences, scale)``: out [N, Hq, D] and log-sum-exp [N, Hq] float32;
    ``backward(grad, q, k, v, out, lse, sequences, scale)``: dq, dk, dv. q [N, Hq, D], k and v [M, Hk, D]."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(q: Tensor, who: str, cure: str) -> Kernel:
    """The kernel that takes tensors like ``q`` [T, Hq, D]. Raises NotImplementedError if there is none."""
    if q.dtype not in (*flash.HALF, torch.float32):
        raise NotImplementedError(f"{who} on CUDA takes bfloat16, float16 or float32, got {q.dtype}; use {cure}")
    if q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0):
        return Kernel(efficient_forward, efficient_backward)
    if q.shape[2] % 8 or q.shape[2] > MAX_FLASH_WIDTH:
        raise NotImplementedError(
            f"{who} on CUDA takes half-precision heads of a multiple of 8 up to {MAX_FLASH_WIDTH}, got {q.shape[2]}; "
            f"use {cure}"
        )
    if flash.in_force() == "flash_attn":
        return Kernel(package_forward, package_backward)
    return Kernel(flash_forward, flash_backward)


@contextmanager
def _repeatable() -> Iterator[None]:
    """PyTorch's kernels sum query gradients in a fixed order only in the strict deterministic mode. In the mode that
    warns (because another operator has no such form), they warn and sum in any order; this makes the mode strict."""
    warns = torch.get_deterministic_debug_mode() == 1
    if warns:
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        if warns:
            torch.set_deterministic_debug_mode("warn")


def flash_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    # For a bound of 1 the kernel assumes one query in every sequence and reshapes, which is wrong for empty ones.
    longest = max(2, s.max_queries)
    out, lse, *_ = _flash_forward(
        q, k, v, s.cu_queries, s.cu_keys, longest, s.max_keys, 0.0, s.causal, False, scale=scale
    )
    return out, lse.t()  # [Hq, N]


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel reads two numbers of the dropout's generator even without dropout.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    with _repeatable():
        return _flash_backward(
            grad, q, k, v, out, lse.t().contiguous(), s.cu_queries, s.cu_keys, max(2, s.max_queries), s.max_keys,
            0.0, s.causal, state, unused, scale=scale,
        )  # fmt: skip


def package_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """By flash-attn's registered operator, because ``flash_attn_varlen_func`` does not return the log-sum-exp."""
    out, lse, *_ = torch.ops.flash_attn._flash_attn_varlen_forward(
        q, k, v, s.cu_queries, s.cu_keys, max(2, s.max_queries), s.max_keys, 0.0, scale, s.causal, *NO_EXTRAS, False
    )  # fmt: skip
    return out, lse.t()


def package_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    state = torch.zeros(2, dtype=torch.int64, device=q.device)  # numbers of the dropout's generator
    torch.ops.flash_attn._flash_attn_varlen_backward(
        grad, q, k, v, out, lse.t().contiguous(), dq, dk, dv, s.cu_queries, s.cu_keys, max(2, s.max_queries),
        s.max_keys, 0.0, scale, s.causal, *NO_EXTRAS, torch.are_deterministic_algorithms_enabled(), state,
    )  # fmt: skip
    return dq, dk, dv


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel does not support grouped heads: one call for each place in a group, all on the same keys."""
    sequence, position = _places(s, q.shape[0])
    parts, sums = [], []
    for member in _members(q, k):
        out, lse, *_ = _efficient_forward(
            member, k[None], v[None], None, s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, 0.0,
            CAUSAL[s.causal], True, scale=scale,
        )  # fmt: skip
        parts.append(out[0])
        sums.append(lse[sequence.clamp(max=lse.shape[0] - 1), :, position])  # [B, Hk, length] to [N, Hk]
    return torch.stack(parts, 2).flatten(1, 2), torch.stack(sums, 2).flatten(1, 2)


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    sequence, position = _places(s, q.shape[0])
    count, length = s.cu_queries.shape[0] - 1, -(-s.max_queries // 32) * 32
    dq, dk, dv = [], [], []
    generator = torch.zeros((), dtype=torch.long, device=q.device)
    for member, upstream, joint, sums in zip(*(_members(x, k) for x in (q, grad, out, lse[..., None])), strict=True):
        # An infinite log-sum-exp gives padding the probability 0; an extra last sequence takes rows outside of all.
        padded = lse.new_full((count + 1, k.shape[1], length), torch.inf)
        padded[sequence, :, position] = sums[0, :, :, 0]
        with _repeatable():
            parts = _efficient_backward(
                upstream, member, k[None], v[None], None, joint.contiguous(), s.cu_queries, s.cu_keys, s.max_queries,
                s.max_keys, padded[:count], 0.0, generator, generator, CAUSAL[s.causal], False, scale=scale,
            )  # fmt: skip
        for into, part in zip((dq, dk, dv), parts, strict=False):
            into.append(part[0])
    return torch.stack(dq, 2).flatten(1, 2), sum(dk), sum(dv)


def _members(x: Tensor, k: Tensor) -> list[Tensor]:
    """[N, Hq, D] as one view [1, N, Hk, D] for each place in a group of query heads."""
    return list(x.unflatten(1, (k.shape[1], -1))[None].unbind(3))


def _places(s: Sequences, rows: int) -> tuple[Tensor, Tensor]:
    """([N], [N]) int64: the sequence of each row of queries (B outside of all) and the row's place in it."""
    sequence = sequence_of_token(s.cu_queries, rows)
    place = torch.arange(rows, device=sequence.device) - s.cu_queries[sequence.clamp(max=s.cu_queries.shape[0] - 2)]
    return sequence, torch.where(sequence < s.cu_queries.shape[0] - 1, place, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    kernel, sequences = _plain(q, cu_seqlens, longest)
    out, lse = kernel.forward(*dense_heads(q, k, v), sequences, scale)
    return out, lse.t().contiguous()


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, sequences = _plain(q, cu_seqlens, longest)
    return kernel.backward(*dense_heads(grad, q, k, v), out, lse.t(), sequences, scale)


def _plain(q: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Kernel, Sequences]:
    cu = cu_seqlens.contiguous()
    return kernel_for(q, "varlen attention", "a model with other heads"), Sequences(cu, cu, longest, longest, False)


_operator = attention_operator("varlen_attention", "stock", _attend, _gradients, tensors=4)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float) -> Tensor:
    """Full attention within sequences that fill all rows, on CUDA. q [N, H, D], k and v [N, Hk, D], ``cu_seqlens``
    int32 [B + 1] from 0 to N, ``longest`` a bound of the lengths; [N, H, D].

    Raises:
        NotImplementedError: a dtype or head width that no kernel takes.
    """
    return _operator(q, k, v, cu_seqlens, longest, scale)[0]
