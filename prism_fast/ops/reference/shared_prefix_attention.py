"""Attention over packed groups that share a prefix, by an explicit mask per block of queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..prefix_layout import fitting, misfit, refuse_misfit
from ..results import PrefixLayout
from .products import matmul
from .segments import sequence_of_token

BLOCK_BYTES = 64 << 20  # scores of one block of queries


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    """See ``prism_fast.ops.shared_prefix_attention``. q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]."""
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_misfit(layout, q.shape[0])
    with torch.autocast(q.device.type, enabled=False):  # products in the operands' own dtype
        return _blocks(q, k, v, layout, scale)


def _blocks(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    tokens, heads, given = q.shape[0], q.shape[1], q.dtype
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    bad = misfit(layout, tokens)
    layout = PrefixLayout(*fitting(layout, bad), *layout[4:])
    segments = layout.branch_prefix.shape[0]
    segment = sequence_of_token(layout.cu_branch, tokens)
    group = heads // k.shape[1]
    used = bad | (segment < segments)
    # Padding may hold infinities and NaNs, which a probability of 0 would not remove.
    q, k, v = (torch.where(used[:, None, None], x, 0.0).to(kind) for x in (q, k, v))
    queries = (q + torch.where(bad, math.nan, 0.0)).movedim(1, 0)  # [Hq, T, D]
    keys, values = (x.movedim(1, 0).repeat_interleave(group, 0) for x in (k, v))
    start, stop = _prefix_of_token(layout, segment, segments)
    rows = max(1, BLOCK_BYTES // max(1, heads * tokens * queries.element_size()))
    # Checkpoints keep the inputs of a block, not its probabilities; torch.func transforms do not support them.
    again = rows < tokens and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    parts = []
    for at in range(0, tokens, rows):
        block = slice(at, min(tokens, at + rows))
        arguments = (queries[:, block], keys, values, segment, segment[block], start[block], stop[block], at, scale)
        if again:
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False))
        else:
            parts.append(_attend(*arguments))
    if not parts:
        return v.new_empty((0, heads, v.shape[2]), dtype=given)
    out = torch.cat(parts, 1).movedim(0, 1)
    return torch.where(used[:, None, None], out, 0.0).to(given)


def _prefix_of_token(layout: PrefixLayout, segment: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """([T], [T]) begin and end of the prefix that each token sees; equal where it sees none."""
    if segments == 0 or layout.prefix_start.shape[0] == 0:
        return torch.zeros_like(segment), torch.zeros_like(segment)
    prefix = layout.branch_prefix.long()[segment.clamp(max=segments - 1)]
    row = prefix.clamp(min=0)
    start = layout.prefix_start.long()[row]
    return start, start + torch.where(prefix >= 0, layout.prefix_len.long()[row], 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: Tensor,
    own: Tensor,
    start: Tensor,
    stop: Tensor,
    at: int,
    scale: float,
) -> Tensor:
    """[Hq, n, Dv] attention of the n queries from position ``at`` on."""
    position = torch.arange(k.shape[1], device=k.device)[None]
    mine = at + torch.arange(q.shape[1], device=q.device)[:, None]
    seen = (segment[None] == own[:, None]) & (position <= mine)
    seen = seen | ((position >= start[:, None]) & (position < stop[:, None]))
    score = (matmul(q, k.transpose(1, 2)) * scale).masked_fill(~seen, -math.inf)
    return matmul(score.softmax(-1), v)
