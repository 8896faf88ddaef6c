"""Advantages of the alignment and RLVR stages, each one or two calls of ``group_advantage``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast.ops import group_advantage

MODES = ("default", "acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align")


def alignment_advantage(
    scores: Tensor,
    group: Tensor,
    *,
    valid: Tensor,
    accuracy: Tensor | None = None,
    format: Tensor | None = None,
    mode: str = "default",
    weights: Sequence[float] = (0.5, 0.5),
    normalize: str = "per_score",
    align_coef: float = 1.0,
    wrong_penalty: float = 1.0,
    format_penalty: float = 1.5,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    invalid: str = "below_min",
    eps: float = 1e-6,
    singleton: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """[B] advantage from the discriminator's scores, in one of six published forms.

    With F = not valid, W = valid and accuracy <= 0, GN as in ``group_advantage`` and A = sum_k weights_k *
    GN(scores_k), or GN(sum_k weights_k * scores_k) with ``normalize="combined"`` (the printed equation), invalid scores
    replaced as ``invalid`` says:

    =========== =====================================================================================================
    default     A - format_penalty * F
    acc_gating  c * A - wrong_penalty * W - format_penalty * F
    gated_align c * A * (1 - F)(1 - W) - wrong_penalty * W - format_penalty * F
    rlvr        GN(R) + c * A * (1 - F)(1 - W)
    rlvr_v2     GN(R - wrong_penalty * W - format_penalty * F) + c * A * (1 - F)(1 - W)
    sign_align  GN((1 - F)(R - wrong_penalty * W) - format_penalty * F) + c * A * (1 - F)(1 - 2 W)
    =========== =====================================================================================================

    with c = align_coef and R = accuracy_weight * accuracy + format_weight * format.

    Args:
        scores: [B, K] floating, one column per scored span: caption and reasoning, or the whole response.
        group: [B] int64 or int32 prompt ids in [0, B).
        valid: [B] bool, responses that obey the format.
        accuracy: [B] floating, 0 = wrong; every mode but ``default`` needs it.
        format: [B] floating reward; None = 1 where valid, else 0.
        weights: K numbers.
        normalize: ``per_score`` (published code) or ``combined`` (printed eq. 1 and 3).
        invalid, eps, singleton, backend: as in ``group_advantage``. Published: below_min, 1e-6, identity. The default
            ``zero`` gives a response that has no rival no advantage.

    Raises:
        ValueError: unknown mode, missing accuracy, or what ``group_advantage`` refuses.

    Source: PRISM (arXiv 2604.28123), ``compute_grpo_multi_reward_advantage``; the default mode is its recipe.
    """
    if mode not in MODES:
        raise ValueError(f"alignment_advantage: mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if mode != "default" and accuracy is None:
        raise ValueError(f"alignment_advantage: mode={mode!r} needs accuracy [B] (0 = wrong answer)")
    kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
    options = {"eps": eps, "singleton": singleton, "backend": backend}
    aligned = {"normalize": normalize, "valid": valid, "invalid": invalid}
    if mode == "default":
        return group_advantage(scores, group, weights=weights, invalid_penalty=format_penalty, **aligned, **options)
    bad = (~valid).to(kind)
    wrong = (valid & (accuracy <= 0)).to(kind)
    scaled = [align_coef * weight for weight in weights]
    if mode in ("acc_gating", "gated_align"):
        return group_advantage(
            scores,
            group,
            weights=scaled,
            gate=(1.0 - bad) * (1.0 - wrong) if mode == "gated_align" else None,
            offset=-wrong_penalty * wrong,
            invalid_penalty=format_penalty,
            **aligned,
            **options,
        )
    reward = accuracy_weight * accuracy.to(kind) + format_weight * (1.0 - bad if format is None else format.to(kind))
    gate = (1.0 - bad) * (1.0 - wrong)
    if mode == "rlvr_v2":
        reward = reward - wrong_penalty * wrong - format_penalty * bad
    elif mode == "sign_align":
        reward = (1.0 - bad) * (reward - wrong_penalty * wrong) - format_penalty * bad
        gate = (1.0 - bad) * (1.0 - 2.0 * wrong)
    outcome = group_advantage(reward[:, None], group, weights=(1.0,), **options)
    return group_advantage(scores, group, weights=scaled, gate=gate, offset=outcome, **aligned, **options)


def alignment_terms(
    scores: Tensor,
    group: Tensor,
    *,
    valid: Tensor,
    weights: Sequence[float] = (0.5, 0.5),
    invalid: str = "below_min",
    eps: float = 1e-6,
    singleton: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """[B, K] the terms weights_k * GN(scores_k) of ``alignment_advantage``'s default mode before their sum, for credit
    per span. Arguments and errors as there."""
    options = {"weights": weights, "valid": valid, "invalid": invalid, "eps": eps, "singleton": singleton}
    return group_advantage(scores, group, per_score=True, backend=backend, **options)


def outcome_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    scored: Tensor | None = None,
    normalize: str = "per_score",
    eps: float = 1e-6,
    singleton: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """[B] advantage of one reward per response.

    ``scored``: [B] bool, responses that have a reward; None = all. The others get 0, and their group is normalised
    without them (as in TRL, where a reward function gave None).
    ``normalize``: ``per_score`` is GRPO (arXiv 2402.03300), ``mean_only`` Dr. GRPO (arXiv 2503.20783), the others as
    in ``group_advantage``. The published GRPO treats a response without rival as ``singleton="identity"``.
    Raises ValueError as ``group_advantage`` does.
    """
    options = {"normalize": normalize, "eps": eps, "singleton": singleton, "backend": backend}
    return group_advantage(reward[:, None], group, weights=(1.0,), valid=scored, invalid="exclude", **options)
