"""Packed sequences: from offsets to per-token sequence numbers and sums, without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[N] int64 sequence of each token; tokens past ``cu_seqlens[-1]`` get B (one past the last sequence)."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def segment_sum(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums of ``value`` [N, ...] per segment: [segments, ...]."""
    return value.new_zeros((segments, *value.shape[1:])).index_add(0, segment, value)
