"""Per-token estimators of KL(policy || reference) with the published clamps."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_CLAMP = 20.0
VALUE_CLAMP = 10.0


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """[N] estimate of each token, differentiable in ``logp``.

    ``k1``: logp - ref. ``abs``: its absolute value. ``k2``: half its square. ``k3``: exp(k) - k - 1 with
    k = clamp(ref - logp, +-20), clamped to +-10; no gradient where a clamp acts. ``k1+``, ``abs+``, ``k3+``: straight
    through, the value of the form with the gradient of ``k2``, which in expectation over the policy's own samples is
    the gradient of the divergence. Source: Schulman, "Approximating KL divergence"; clamps and straight-through forms
    of verl ``kl_penalty``.
    """
    if kind.endswith("+"):
        square = kl_estimate(logp, ref_logp, "k2")
        return square - square.detach() + kl_estimate(logp, ref_logp, kind[:-1]).detach()
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    k = (-difference).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (k.exp() - k - 1.0).clamp(-VALUE_CLAMP, VALUE_CLAMP)
