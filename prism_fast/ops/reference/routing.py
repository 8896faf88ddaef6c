"""From router scores to an execution plan for the experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..results import Routing


def route_experts(router_logits: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """See ``prism_fast.ops.route_experts``. router_logits [T, E]."""
    kind = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    logits = router_logits.to(kind)
    probability = logits.softmax(-1)
    # A stable sort of the logits, not topk of the probabilities: different logits may round to equal probabilities, and
    # among equal logits the lower expert number wins on every device. Rows with a NaN softmax go to the first experts.
    comparable = torch.where(probability.isnan(), 0.0, logits)
    experts = comparable.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probability.gather(-1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    # A row with a NaN softmax has a NaN statistic too, even if the log-sum-exp of its logits is infinite.
    broken = torch.where(probability.detach().isnan().any(-1), math.nan, 0.0)
    z_stat = (logits.logsumexp(-1) + broken).square().sum()
    return Routing(weights, experts, *_plan(experts, logits.shape[1]), probability.sum(0), z_stat)


def plan_experts(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Routing:
    """See ``prism_fast.ops.plan_experts``. top_k_index, top_k_weights [T, top_k]."""
    kind = torch.float64 if top_k_weights.dtype == torch.float64 else torch.float32
    known = (top_k_index >= 0) & (top_k_index < num_experts)
    experts = torch.where(known, top_k_index.long(), 0)
    weights = torch.where(known, top_k_weights.to(kind), math.nan)
    unknown = weights.new_empty(0)
    return Routing(weights, experts, *_plan(experts, num_experts), unknown, unknown)


def _plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(permutation [M] int64, tokens [M], slots [T, top_k], offsets [E + 1], all int32) of the assignments sorted by
    expert, then by token."""
    sorted_experts, permutation = experts.flatten().sort(dim=0, stable=True)
    numbers = torch.arange(len(permutation), device=experts.device, dtype=torch.int32)
    slots = torch.empty_like(numbers).scatter(0, permutation, numbers).view(experts.shape)
    tokens = permutation.div(experts.shape[1], rounding_mode="floor").int()
    borders = torch.arange(num_experts + 1, device=experts.device, dtype=sorted_experts.dtype)
    return permutation, tokens, slots, torch.searchsorted(sorted_experts.contiguous(), borders, out_int32=True)
