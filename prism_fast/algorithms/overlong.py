"""Soft penalty of responses close to the length limit."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(length: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Penalty to add to the reward, [B] float32: min(0, -(length - (max_length - buffer)) / buffer * factor).

    Args:
        length: [B] response lengths in tokens, integer or floating.
        max_length: longest response allowed, tokens.
        buffer: tokens before the limit over which the penalty grows from 0 to ``factor``, 1 to ``max_length``.
        factor: penalty at the limit, >= 0.

    Raises:
        ValueError: a length or factor out of range.

    Source: soft overlong punishment of DAPO (arXiv 2503.14476 eq. 13), as in verl ``DAPORewardManager``.
    """
    if max_length < 1 or not 1 <= buffer <= max_length:
        raise ValueError(f"overlong_penalty: buffer={buffer} must be in [1, max_length={max_length}]")
    if factor < 0:
        raise ValueError(f"overlong_penalty: factor={factor} must not be negative; the penalty is subtracted already")
    beyond = length.to(torch.float32) - (max_length - buffer)
    return (-beyond / buffer * factor).clamp(max=0.0)
