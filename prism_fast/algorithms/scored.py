"""Scores as they enter the discriminator's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_scored(
    score: Tensor,
    length: Tensor | None,
    penalty: float | Sequence[float],
    clip: float | None,
    *,
    clip_first: bool = False,
) -> Tensor:
    """Scores [N, K] minus ``penalty`` times log(1 + ``length`` [N, K]), then clamped to ±``clip``; with ``clip_first``
    clamped to it before the penalty too, as published."""
    score = score if score.dtype == torch.float64 else score.float()
    if clip_first and clip is not None:
        score = score.clamp(-clip, clip)
    if length is not None:
        rate = torch.stack([score.new_full((), b) for b in _rates(penalty, score.shape[1])])
        score = score - rate * length.to(score.dtype).log1p()
    return score if clip is None else score.clamp(-clip, clip)


def _rates(penalty: float | Sequence[float], columns: int) -> list[float]:
    return [float(penalty)] * columns if isinstance(penalty, int | float) else [float(b) for b in penalty]
