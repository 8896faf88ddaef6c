"""Clipped policy-gradient losses on packed sequences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..results import PolicyStats
from .aggregation import default_denominator, token_weights
from .kl import kl_estimate
from .segments import offsets_are_bad, segment_sum, sequence_of_token

if TYPE_CHECKING:
    from ..policy_options import PolicyLossOptions

LOG_RATIO_CLAMP = 20.0  # token ratios
SEQUENCE_LOG_RATIO_MAX = 10.0  # sequence ratios (GSPO)


def policy_loss(
    logp: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    *,
    options: PolicyLossOptions,
    old_logp: Tensor | None,
    token_advantage: Tensor | None,
    denominator: Tensor | float | None,
    entropy: Tensor | None,
    ref_logp: Tensor | None,
    is_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, PolicyStats]:
    """See ``prism_fast.ops.policy_loss``."""
    aggregation = options.aggregates
    kind = torch.float64 if logp.dtype == torch.float64 else torch.float32
    sequences = cu_seqlens.shape[0] - 1
    sequence = sequence_of_token(cu_seqlens, logp.shape[0])
    active = sequence < sequences
    if mask is not None:
        active = active & (mask if mask.dtype == torch.bool else mask != 0)

    def clean(value: Tensor) -> Tensor:
        """Inactive tokens may hold anything, NaN included; they become 0 and get gradient 0."""
        return torch.where(active, value.to(kind), 0.0)

    new = clean(logp)
    old = new.detach() if old_logp is None else clean(old_logp.detach())
    if token_advantage is not None:
        a = clean(token_advantage.detach())
    else:
        a = clean(torch.cat((advantage.detach().to(kind), new.new_zeros(1)))[sequence])
    lengths = segment_sum(active.to(kind), sequence, sequences + 1)
    log_ratio = new - old
    on_average = lengths.clamp(min=1.0)
    if options.loss in ("gspo", "gspo_token"):
        drift = segment_sum(log_ratio.detach(), sequence, sequences + 1) / on_average
        # The value is the sequence's geometric-mean ratio; the gradient goes to each token's own log-probability.
        exponent = (new - new.detach() + drift[sequence]).clamp(max=SEQUENCE_LOG_RATIO_MAX)
        measured = log_ratio.detach()
    else:
        exponent = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        measured = exponent.detach()
    ratio = exponent.exp()
    each, held_low, held_high, held_dual = _token_loss(options, ratio, new, a)
    if is_weight is not None:
        each = each * clean(is_weight.detach())
    if denominator is None:
        denominator = default_denominator(aggregation, lengths[:sequences])
    elif not isinstance(denominator, Tensor):
        denominator = new.new_full((), denominator)
    share = token_weights(aggregation, active, sequence, lengths, denominator.to(kind), options.norm_length)
    pure = (each.detach() * share).sum()
    divergence = None if ref_logp is None else clean(kl_estimate(new, clean(ref_logp.detach()), options.kl))
    if divergence is not None and options.kl_importance:
        if options.loss in ("gspo", "gspo_token"):  # one ratio, to which every token of the sequence contributes
            drift = segment_sum(log_ratio, sequence, sequences + 1) / on_average
            divergence = divergence * clean(drift.clamp(max=SEQUENCE_LOG_RATIO_MAX).exp()[sequence])
        else:
            divergence = divergence * ratio
    if divergence is not None and options.kl_coef != 0.0:
        each = each + options.kl_coef * divergence
    entropies = None if entropy is None else clean(entropy)
    learnt = [new]
    if entropies is not None and options.entropy_coef != 0.0:
        each = each - options.entropy_coef * entropies
        learnt = [new, entropies]
    # A NaN loss must have NaN gradients, so that gradients alone show it; those of a clamp would be numbers.
    total = (_shown(each.isnan(), sum(learnt), each) * share).sum()
    bad = offsets_are_bad(cu_seqlens, logp.shape[0])
    everything = [x.to(kind).sum() for x, _ in zip((logp, entropy), learnt, strict=False)]
    total = _shown(bad, sum(everything), total)
    count = lengths[:sequences].sum()

    def mean(value: Tensor) -> Tensor:
        return clean(value.detach()).sum() / count

    r = ratio.detach()
    unknown = new.new_full((), math.nan)
    largest = torch.cat((torch.where(active, r, -math.inf), new.new_full((1,), -math.inf))).amax()
    stats = PolicyStats(
        tokens=count,
        sequences=(lengths[:sequences] > 0).to(kind).sum(),
        policy_loss=pure,
        clip_fraction_low=mean(held_low),
        clip_fraction_high=mean(held_high),
        dual_clip_fraction=mean(held_dual),
        ratio_mean=mean(r),
        ratio_max=torch.where(count > 0, largest, math.nan),
        approx_kl=mean(-measured),
        kl=unknown if divergence is None else mean(divergence),
        entropy=unknown if entropies is None else mean(entropies),
    )
    return total, PolicyStats._make(torch.where(bad, math.nan, value) for value in stats)


def _shown(sick: Tensor, learnt: Tensor, value: Tensor) -> Tensor:
    """``value``; where ``sick``, NaN with a NaN gradient for ``learnt``."""
    # A plain factor NaN would make the gradients of all elements NaN.
    return torch.where(sick, learnt * torch.where(sick, math.nan, 0.0), value)


def _token_loss(
    options: PolicyLossOptions, ratio: Tensor, new: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] loss of each token, and three masks [N]: tokens held at the lower, the upper and the dual bound."""
    none = torch.zeros_like(ratio, dtype=torch.bool)
    if options.loss == "sapo":
        positive, negative = options.sapo_temperature
        tau = torch.full_like(ratio, negative).masked_fill_(a > 0, positive)
        return -a * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau, none, none, none
    low, high = 1.0 - options.clips[0], 1.0 + options.clips[1]
    clipped = ratio.clamp(low, high)
    if options.loss == "cispo":
        fixed = ratio.detach()
        return -a * clipped.detach() * new, fixed < low, fixed > high, none
    plain, held = -a * ratio, -a * clipped
    holds = held > plain
    each = torch.maximum(plain, held)
    dual = none
    if options.bound is not None:
        ceiling = -a * options.bound
        dual = (each > ceiling) & (a < 0)
        each = torch.where(a < 0, torch.minimum(each, ceiling), each)
    return each, holds & (a < 0), holds & (a > 0), dual
