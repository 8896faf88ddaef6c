"""Per-token estimators of KL(policy || reference) with the published clamps."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_CLAMP = 20.0
VALUE_CLAMP = 10.0


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """[N] estimate of each token, differentiable in ``logp``.

    ``k1``: logp - ref. ``abs``: its absolute value. ``k2``: half its square. ``k3``: exp(k) - k - 1 with
    k = clamp(ref - logp, +-20), clamped to +-10; no gradient where a clamp acts. Source: Schulman, "Approximating KL
    divergence"; clamps of verl ``kl_penalty``.
    """
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    k = (-difference).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (k.exp() - k - 1.0).clamp(-VALUE_CLAMP, VALUE_CLAMP)
