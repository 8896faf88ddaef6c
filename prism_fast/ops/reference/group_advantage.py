"""Group-relative advantages, stated with plain tensor operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .segments import segment_sum


def group_advantage(
    scores: Tensor,
    group: Tensor,
    weights: Tensor,
    valid: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    normalize: str,
    eps: float,
    invalid: str,
    invalid_penalty: float,
    singleton: str,
    power: float,
    per_score: bool,
) -> Tensor:
    """See ``prism_fast.ops.group_advantage``. scores [B, K], group [B] int64, weights [K]."""
    rows = scores.shape[0]
    x = scores.detach().to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    weights = weights.to(x.dtype)
    known = (group >= 0) & (group < rows)
    slot = torch.where(known, group.long(), rows)  # ids outside [0, B) share one extra slot and come out as NaN
    counted = known
    if valid is not None and invalid == "below_min":
        x = _below_min(x, slot, valid)
    elif valid is not None and invalid == "exclude":
        counted = known & valid
    if normalize == "combined":
        x = (x * weights).sum(-1, keepdim=True)
    z = _normalized(x, slot, counted, normalize, eps, singleton)
    if power != 1.0:
        size = segment_sum(counted.to(x.dtype), slot, rows + 1)[slot, None]
        shaped = z.sign() * z.abs().pow(power)
        z = torch.where(size > 1, _normalized(shaped, slot, counted, "per_score", eps, "zero"), z)
    terms = z if normalize == "combined" else z * weights
    if gate is not None:
        terms = terms * gate.detach().to(x.dtype)[:, None]
    if per_score:
        return torch.where(known[:, None], terms, math.nan)
    advantage = terms.sum(-1)
    if offset is not None:
        advantage = advantage + offset.detach().to(x.dtype)
    if valid is not None:
        advantage = advantage - invalid_penalty * (~valid).to(x.dtype)
    return torch.where(known, advantage, math.nan)


def _lowest(x: Tensor, slot: Tensor, counted: Tensor) -> Tensor:
    """[B, K] smallest counted score of each row's group; +inf where nothing is counted."""
    start = x.new_full((x.shape[0] + 1, x.shape[1]), math.inf)
    masked = torch.where(counted[:, None], x, math.inf)
    return start.scatter_reduce(0, slot[:, None].expand_as(x), masked, "amin")[slot]


def _below_min(x: Tensor, slot: Tensor, valid: Tensor) -> Tensor:
    """Invalid rows get the smallest valid score of their group minus 1; -1 in a group without a valid row."""
    some = segment_sum(valid.to(x.dtype), slot, x.shape[0] + 1)[slot, None] > 0
    floor = torch.where(some, _lowest(x, slot, valid) - 1.0, -1.0)
    return torch.where(valid[:, None], x, floor)


def _normalized(x: Tensor, slot: Tensor, counted: Tensor, normalize: str, eps: float, singleton: str) -> Tensor:
    """[B, K] normalised scores; rows that are not counted get 0."""
    groups = x.shape[0] + 1
    keep = counted[:, None]
    size = segment_sum(counted.to(x.dtype), slot, groups)[slot, None]
    # Distances from the group's minimum are exactly 0 in a group of equal scores; a mean of 0.9s is not exactly 0.9.
    lifted = torch.where(keep, x - _lowest(x, slot, counted), 0.0)
    mean = segment_sum(lifted, slot, groups)[slot] / size.clamp(min=1.0)
    centered = torch.where(keep, lifted - mean, 0.0)
    scale = torch.ones_like(x)
    if normalize in ("per_score", "combined"):
        variance = segment_sum(centered.square(), slot, groups)[slot] / (size - 1.0).clamp(min=1.0)
        scale = variance.sqrt() + eps
        alone = x / (1.0 + eps)
    elif normalize == "batch":
        scale = (_batch_std(x, keep) + eps).expand_as(x)
        alone = x / scale
    else:
        alone = x
        if normalize == "leave_one_out":
            scale = (size - 1.0).clamp(min=1.0) / size.clamp(min=1.0)
    z = torch.where(centered == 0.0, 0.0, centered / scale)  # also with eps = 0
    if singleton == "identity":
        z = torch.where(keep & (size == 1.0), alone, z)
    return z


def _batch_std(x: Tensor, keep: Tensor) -> Tensor:
    """[1, K] unbiased standard deviation over all counted rows."""
    count = keep.to(x.dtype).sum()
    mean = torch.where(keep, x, 0.0).sum(0, keepdim=True) / count.clamp(min=1.0)
    return (torch.where(keep, x - mean, 0.0).square().sum(0, keepdim=True) / (count - 1.0).clamp(min=1.0)).sqrt()
