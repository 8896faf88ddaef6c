"""Packed sequences: sequence numbers of tokens and sums per sequence from offsets, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bad_values import counted


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[N] int64 sequence of each token; tokens past ``cu_seqlens[-1]`` get B (one past the last sequence)."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def offsets_are_bad(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """0-d bool: the offsets do not ascend from 0 to at most ``tokens``. Counted among the bad values."""
    inside = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    return counted(~inside[None])[0]


def segment_sum(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums of ``value`` [N, ...] per segment: [segments, ...]."""
    return value.new_zeros((segments, *value.shape[1:])).index_add(0, segment, value)
