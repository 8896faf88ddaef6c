"""The mathematics of one block of rows: log-probability and entropy from scores, and the gradient of both.

Scores are kept relative to their row maximum, so that maximum and log-sum are never added into one rounded number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_PROBABILITY_FLOOR = -1e4


def temperature_rows(temperature: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """[N, 1] temperature of each row, in the dtype of the computation."""
    if not isinstance(temperature, Tensor):
        return torch.full((rows, 1), float(temperature), dtype=like.dtype, device=like.device)
    return temperature.detach().to(like.dtype).expand(rows)[:, None]


def target_rows(target: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(column [N] int64 that is safe to gather, ignored [N], outside the vocabulary [N]) of targets."""
    ignored = target == ignore_index
    outside = ((target < 0) | (target >= vocabulary)) & ~ignored
    return torch.where(ignored | outside, 0, target.long()), ignored, outside


def shifted_(z: Tensor, temperature: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """In place: raw scores z [n, V] -> capped, over the temperature, minus the row maximum. Returns (z, maximum)."""
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    z.div_(temperature)
    top = z.amax(-1, keepdim=True)
    # A raw score of -inf (a banned token) becomes the lowest number: its probability is 0, and 0 * z stays 0.
    return z.sub_(top).clamp_(min=torch.finfo(z.dtype).min), top


def statistics(z: Tensor, column: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [n], log-sum [n], entropy [n] or empty) of shifted scores z [n, V]; logp means nothing for column -1."""
    e = z.exp()
    total = e.sum(-1)
    log_sum = total.log()
    logp = z.gather(-1, column.clamp(min=0)[:, None])[:, 0] - log_sum
    if not entropy:
        return logp, log_sum, z.new_empty(0)
    return logp, log_sum, log_sum - e.mul_(z).sum(-1) / total  # H = log(sum e) - sum e z / sum e


def gradient_(
    z: Tensor,
    column: Tensor,
    log_sum: Tensor,
    logp_grad: Tensor,
    entropy_grad: Tensor | None,
    entropy: Tensor,
    temperature: Tensor,
    softcap: float | None,
    top: Tensor,
) -> Tensor:
    """In place: shifted scores z [n, V] -> gradient with respect to the raw scores.

    d logp / dz_j = [j = target] - p_j and dH / dz_j = -p_j (log p_j + H). Rows whose upstream gradients are exactly 0
    come out as exact zeros whatever they hold.
    """
    idle = logp_grad == 0.0
    slope = None
    if softcap is not None:
        slope = 1.0 - (z + top).mul_(temperature / softcap).square_()
    # Probabilities are 0 long before the floor; without it a banned token's 0 would meet an infinite coefficient.
    z.sub_(log_sum[:, None]).clamp_(min=LOG_PROBABILITY_FLOOR)
    if entropy_grad is None:
        z.exp_().mul_(-logp_grad[:, None])
    else:
        idle = idle & (entropy_grad == 0.0)
        coefficient = (z + entropy[:, None]).mul_(entropy_grad[:, None]).add_(logp_grad[:, None])
        z.exp_().mul_(coefficient).neg_()
    at_target = torch.where(column < 0, 0.0, logp_grad)  # -1: the target is no column here
    z.scatter_add_(-1, column.clamp(min=0)[:, None], at_target[:, None])
    z.div_(temperature)
    if slope is not None:
        z.mul_(slope)
    return z.masked_fill_(idle[:, None], 0.0)


def finish(logp: Tensor, entropy: Tensor, ignored: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Ignored rows give 0, targets outside the vocabulary give NaN. ``entropy`` may be empty."""
    logp = torch.where(outside, math.nan, logp).masked_fill(ignored, 0.0)
    return logp, entropy.masked_fill(ignored, 0.0) if entropy.shape == logp.shape else entropy


def upstream(gradient: Tensor | None, logp: Tensor, ignored: Tensor) -> Tensor:
    """[N] upstream gradient of a result in the dtype of the computation; none and ignored rows count as 0."""
    if gradient is None:
        return torch.zeros_like(logp)
    return gradient.to(logp.dtype).masked_fill(ignored, 0.0)
