"""Corrections for the gap between the engine that sampled and the model that learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..results import ImportanceWeights
from .segments import offsets_are_bad, segment_sum, sequence_of_token

LOG_RATIO_CLAMP = 20.0


def importance_weights(
    rollout_logp: Tensor, logp: Tensor, cu_seqlens: Tensor, *, mode: str, low: float, high: float
) -> ImportanceWeights:
    """See ``prism_fast.ops.importance_weights``."""
    kind = torch.float64 if logp.dtype == torch.float64 else torch.float32
    sequences = cu_seqlens.shape[0] - 1
    sequence = sequence_of_token(cu_seqlens, logp.shape[0])
    active = sequence < sequences
    log_ratio = torch.where(active, logp.detach().to(kind) - rollout_logp.detach().to(kind), 0.0)
    level, action = mode.split("_")
    if level == "token":
        counted, ratio = active, log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    else:
        total = segment_sum(log_ratio, sequence, sequences + 1)[:sequences]
        ratio = total.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        counted = cu_seqlens[1:] > cu_seqlens[:-1]
    inside = (ratio >= low) & (ratio <= high)
    weight = ratio.clamp(low, high) if action == "truncate" else torch.where(inside, ratio, 0.0)
    # A NaN ratio is neither inside nor outside: its weight is NaN, so that it does not vanish as a masked token.
    weight = torch.where(counted, torch.where(ratio.isnan(), math.nan, weight), 0.0)
    count = counted.to(kind).sum()
    moved = (counted & ~inside).to(kind).sum() / count
    none = torch.zeros_like(moved)
    square = weight.square().sum()
    size = torch.where(square == 0.0, 0.0, weight.sum().square() / square)
    if level == "sequence":
        weight = torch.cat((weight, weight.new_zeros(1)))[sequence]
    found = (weight, size, none, moved) if action == "truncate" else (weight, size, moved, none)
    bad = offsets_are_bad(cu_seqlens, logp.shape[0])
    return ImportanceWeights(*(torch.where(bad, math.nan, value) for value in found))
