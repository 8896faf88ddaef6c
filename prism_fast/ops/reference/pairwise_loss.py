"""Bradley-Terry loss of one teacher against its group of students, per score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..results import PairwiseStats
from .segments import segment_sum


def pairwise_loss(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    *,
    valid: Tensor | None,
    clip: float | None,
    lengths: tuple[Tensor, Tensor] | None,
    length_penalty: Sequence[float],
    l2: float,
    spread: float,
    denominator: Tensor | float | None,
    l2_denominator: Tensor | float | None,
) -> tuple[Tensor, PairwiseStats]:
    """See ``prism_fast.ops.pairwise_loss``. teacher [G, K], student [B, K], group [B]."""
    kind = torch.float64 if student.dtype == torch.float64 else torch.float32
    groups = teacher.shape[0]
    t, s = teacher.to(kind), student.to(kind)
    if lengths is not None:
        t = _shortened(t, lengths[0], length_penalty)
        s = _shortened(s, lengths[1], length_penalty)
    use = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    known = (group >= 0) & (group < groups)
    row = torch.where(known, group.long(), 0)
    # Compared before the clamp, which makes scores beyond its bounds equal.
    best = torch.where(known[:, None], t[row], math.nan) if groups else torch.full_like(s, math.nan)
    ties, ahead = best == s, best > s
    if clip is not None:
        t, s = t.clamp(-clip, clip), s.clamp(-clip, clip)
    rival = t[row] if groups else t.sum() + t.new_full(s.shape, math.nan)
    margin = torch.where(known[:, None], rival, math.nan) - s
    pairs = use.to(kind).sum()
    share = 1.0 / _positive(pairs if denominator is None else denominator, s)
    # Rows that do not count may hold any value; zeros replace them before the formula, so their gradient is exactly 0.
    # Not softplus(-margin): PyTorch's is linear beyond 20, a difference that float64 shows.
    bradley_terry = -torch.where(use[:, None], logsigmoid(torch.where(use[:, None], margin, 0.0)), 0.0).sum(0) * share
    total = bradley_terry.sum()
    if l2 != 0.0:
        scores = float(teacher.numel() + student.numel()) if l2_denominator is None else l2_denominator
        total = total + l2 * (t.square().sum() + s.square().sum()) / _positive(scores, s)
    if spread != 0.0:
        total = total + spread * share * _spread(s, group, use & known, groups)
    return total, _stats(rival.detach(), s.detach(), margin.detach(), ties, ahead, use, pairs, bradley_terry.detach())


def _shortened(score: Tensor, length: Tensor, penalty: Sequence[float]) -> Tensor:
    """Scores minus penalty_k * log(1 + tokens)."""
    columns = [length[:, k].to(score.dtype).log1p() * penalty[k] for k in range(score.shape[1])]
    return score - torch.stack(columns, 1) if columns else score


def _positive(count: Tensor | float, like: Tensor) -> Tensor:
    """0-d count in the dtype of the computation, 0 counting as 1."""
    count = count.to(like.dtype) if isinstance(count, Tensor) else like.new_full((), count)
    return torch.where(count == 0, 1.0, count)


def _spread(s: Tensor, group: Tensor, use: Tensor, groups: int) -> Tensor:
    """Sum over usable rows of (r_(j) - (mean + Phi^-1((j - 1/2) / n)))^2, r_(j) the j-th smallest of its group."""
    slot = torch.where(use, group.long(), groups)
    size = segment_sum(use.to(s.dtype), slot, groups + 1)
    start = torch.cumsum(segment_sum(torch.ones_like(slot), slot, groups + 1), 0)
    start = torch.cat((start.new_zeros(1), start[:-1]))
    safe = torch.where(use[:, None], s, 0.0)
    n = size[slot][:, None]
    mean = segment_sum(safe, slot, groups + 1)[slot] / n.clamp(min=1.0)
    by_score = safe.detach().argsort(dim=0, stable=True)  # [B, K]
    order = by_score.gather(0, slot[by_score].argsort(dim=0, stable=True))  # by group, then by score
    position = torch.arange(s.shape[0], device=s.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter(0, order, position) - start[slot][:, None]
    quantile = torch.special.ndtri(((rank.to(s.dtype) + 0.5) / n.clamp(min=1.0)).clamp(0.0, 1.0))
    counted = use[:, None] & (n > 1)
    distance = torch.where(counted, safe - mean - torch.where(counted, quantile, 0.0), 0.0)
    return distance.square().sum()


def _stats(
    rival: Tensor, s: Tensor, margin: Tensor, ties: Tensor, ahead: Tensor, use: Tensor, pairs: Tensor, loss: Tensor
) -> PairwiseStats:
    count = use.sum().expand(s.shape[1])
    keep = use[:, None]
    ties, correct = (keep & ties).sum(0), (keep & ahead).sum(0)

    def mean(value: Tensor) -> Tensor:
        return torch.where(keep, value, 0.0).sum(0) / pairs

    return PairwiseStats(
        pairs=count,
        ties=ties,
        correct=correct,
        margin=mean(margin),
        accuracy=correct.to(s.dtype) / (count - ties).to(s.dtype),
        teacher=mean(rival),
        student=mean(s),
        loss=loss,
    )
