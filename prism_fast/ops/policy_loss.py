"""Policy-gradient losses of the GRPO family on packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .policy_options import PolicyLossOptions, gather, spelled_out
from .reference.policy_loss import policy_loss as reference
from .results import PolicyStats

OP = "policy_loss"
BACKENDS = ("reference", "native")


@spelled_out
def policy_loss(
    logp: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    options: PolicyLossOptions | None = None,
    old_logp: Tensor | None = None,
    token_advantage: Tensor | None = None,
    denominator: Tensor | float | None = None,
    entropy: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
    **settings: Any,
) -> tuple[Tensor, PolicyStats]:
    """Policy term + ``kl_coef`` * KL - ``entropy_coef`` * entropy of response tokens, all aggregated alike.

    With r = exp(clamp(logp - old_logp, -20, 20)), A the advantage and (lo, hi) = ``clip``, a token loses

    ============ ============================================================ ================= =====================
    loss         per token                                                    default clip      default aggregation
    ============ ============================================================ ================= =====================
    grpo         max(-A r, -A clamp(r, 1-lo, 1+hi))                           0.2, 0.2          seq_mean_token_mean
    dapo         the same                                                     0.2, 0.28         token_mean
    dr_grpo      the same                                                     0.2, 0.2          seq_mean_token_sum_norm
    bnpo         the same                                                     0.2, 0.2          token_mean
    gspo         the same, r = exp(min(mean over the sequence, 10))           3e-4, 4e-4        seq_mean_token_mean
    gspo_token   gspo that also takes ``token_advantage``                     3e-4, 4e-4        seq_mean_token_mean
    cispo        -A sg[clamp(r, 1-lo, 1+hi)] logp                             1.0, 4.0          token_mean
    sapo         -A sigmoid(t (r - 1)) 4 / t, t by the sign of A              none              seq_mean_token_mean
    ============ ============================================================ ================= =====================

    and the losses (times ``is_weight``) are summed with weights that an aggregation defines:

    =========================== =========================================== =======================================
    aggregation                 weight of a token                           ``denominator`` counts
    =========================== =========================================== =======================================
    token_mean                  1 / denominator                             active tokens
    seq_mean_token_mean         1 / (active tokens of its sequence * den.)  sequences with an active token
    seq_mean_token_sum          1 / denominator                             sequences with an active token
    seq_mean_token_sum_norm     1 / (norm_length * denominator)             sequences with an active token
    =========================== =========================================== =======================================

    Packed rows are [N] with ``cu_seqlens``. Padded rows are [B, T] without it; every [N] below is then [B, T], and
    ``mask`` says which tokens count. Both give the same results; padding is neither copied nor counted::

        loss, stats = policy_loss(logp, advantage, cu_seqlens, old_logp=old_logp)  # [N], [B], [B + 1], [N]
        loss, stats = policy_loss(logp, advantage, old_logp=old_logp, mask=response_mask)  # [B, T], [B], [B, T], [B, T]

    Args:
        logp: [N] floating, log-probabilities under the policy in nats; the only input with a gradient beside
            ``entropy``.
        advantage: [B] floating, or None with ``token_advantage``.
        cu_seqlens: None for padded rows, else [B+1] int32 offsets, ascending from 0 to at most N; sequences may be
            empty; tokens past the last offset are padding. Other offsets give NaN (loss, statistics and every gradient)
            and count in ``bad_values``.
        old_logp: [N]; None = on-policy, the ratio is 1 by construction and its gradient is that of logp.
        token_advantage: [N] floating instead of ``advantage``; refused by ``gspo``.
        options: the arguments from ``loss`` to ``kl_importance`` as one object, checked once; or as keywords, not both.
        loss, aggregation: see above. grpo accepts every aggregation, cispo and sapo both means, the others only theirs.
        clip: (lo, hi), both >= 0. Not for sapo.
        dual_clip: > 1; where A < 0 the loss is at most -A * dual_clip (arXiv 1912.09729). grpo, dapo, dr_grpo, bnpo.
        delta: > 1 + hi; the same bound under the name of two-sided clipping (INTELLECT-2, arXiv 2505.07291).
        sapo_temperature: (t for A > 0, t for A <= 0), both > 0.
        norm_length: number or 0-d tensor, the constant length of dr_grpo (the longest response allowed), tokens.
        entropy_coef, kl_coef: factors of the terms above; they need ``entropy`` and ``ref_logp``.
        kl: k1 = logp - ref; abs = |k1|; k2 = k1^2 / 2; k3 = exp(k) - k - 1 with k = clamp(-k1, -20, 20), clamped to
            [-10, 10] with gradient 0 where a clamp acts. k1+, abs+, k3+: straight through, the value of the form with
            the gradient of k2, also where a clamp acts.
        kl_importance: multiply the KL estimate by the unclipped ratio r (gspo: the sequence's), with the gradient of
            the product: an estimate under the current policy from tokens of the one that gave ``old_logp``. On-policy
            the value stays and k3 gets the gradient of k2. TRL: ``use_bias_correction_kl``, its default.
        denominator: number or 0-d tensor, the *global* count of the table. Given it, any micro-batching, packing or
            rank count gives the same gradient. None counts this call. 0 counts as 1.
        entropy: [N] floating, nats. Without ``entropy_coef`` it is only reported.
        ref_logp: [N] of a reference policy. Without ``kl_coef`` it is only reported.
        is_weight: [N] floating factors of the policy term, see ``importance_weights``.
        mask: [N] bool, floating or integer (0 = inactive). Inactive tokens may hold NaN; they get gradient exactly 0.
        backend: None, "reference" or "native" (differentiable once).

    Returns:
        (loss 0-d float32, or float64 for float64 ``logp``; PolicyStats). Without an active token the loss is 0. A token
        whose loss is NaN (from any of its inputs) makes the loss NaN and its own gradients NaN.

    Raises:
        ValueError: wrong shape, dtype, device or option, or options that contradict each other.
        TypeError: an unknown keyword, or keywords beside ``options``.
        NotImplementedError: a published loss or KL form that is not offered; the message names a substitute.
        RuntimeError: the backend is missing on this machine.

    Cost: forward of "native" (on CUDA one cooperative launch) writes the gradient too; backward at most multiplies it.

    Sources: GRPO arXiv 2402.03300 eq. 3; DAPO 2503.14476 eq. 8; GSPO 2507.18071 eq. 5 and 14; Dr. GRPO 2503.20783;
    CISPO 2506.13585 eq. 4 (bounds of ScaleRL, 2510.13786); SAPO 2511.20347; bnpo as in TRL; KL with importance
    correction as in TRL 1.16 ``GRPOTrainer._compute_loss`` (DeepSeek-V3.2, 2512.02556); clamps, dual clip and the form
    of GSPO as in verl ``compute_policy_loss_vanilla`` and ``compute_policy_loss_gspo``.
    """
    options = gather(policy_loss, options, settings)
    if (advantage is None) == (token_advantage is None):
        raise ValueError(f"{OP}: pass exactly one of advantage [B] and token_advantage [N]")
    if token_advantage is not None and options.loss == "gspo":
        raise ValueError(f"{OP}: loss='gspo' has one advantage per sequence; use loss='gspo_token'")
    if options.entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef={options.entropy_coef} needs entropy")
    if options.kl_coef != 0.0 and ref_logp is None:
        raise ValueError(f"{OP}: kl_coef={options.kl_coef} needs ref_logp")
    columns = {
        "old_logp": old_logp,
        "token_advantage": token_advantage,
        "entropy": entropy,
        "ref_logp": ref_logp,
        "is_weight": is_weight,
    }
    if isinstance(logp, Tensor) and logp.dim() == 2:
        logp, cu_seqlens, mask, columns = _rows_in_sequence(logp, cu_seqlens, mask, columns)
    elif cu_seqlens is None:
        raise ValueError(f"{OP}: logp must have shape [B, T] with a mask, or [N] with cu_seqlens, which is None")
    _check(logp, advantage, cu_seqlens, columns, mask, denominator, options.norm_length)
    if mask is not None and mask.dtype in checks.INTEGERS:
        mask = mask.bool()
    kernel = reference
    if choose(OP, BACKENDS, backend, logp) == "native":
        from prism_fast.ops.native.policy_loss import run as kernel  # a relative name is resolved anew at each call
    return kernel(logp, advantage, cu_seqlens, options=options, denominator=denominator, mask=mask, **columns)


def _rows_in_sequence(
    logp: Tensor, cu_seqlens: object, mask: object, columns: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor | None]]:
    """Padded rows [B, T] as B sequences of T tokens; the mask excludes padding. (logp, offsets, mask, columns)."""
    if cu_seqlens is not None:
        raise ValueError(f"{OP}: logp [B, T] has its sequences as rows; cu_seqlens must be None, or logp [N]")
    checks.tensor(OP, "logp", logp, shape=(None, None))
    shape = tuple(logp.shape)
    for name, value in columns.items():
        if value is not None:
            checks.tensor(OP, name, value, shape=shape, like=logp)
    if mask is not None:
        checks.tensor(OP, "mask", mask, shape=shape, dtypes=checks.MASKS, like=logp)
        mask = mask.reshape(-1)
    offsets = torch.arange(shape[0] + 1, dtype=torch.int32, device=logp.device) * shape[1]
    flat = {name: None if value is None else value.reshape(-1) for name, value in columns.items()}
    return logp.reshape(-1), offsets, mask, flat


def _check(
    logp: object,
    advantage: object,
    cu_seqlens: object,
    columns: dict[str, object],
    mask: object,
    denominator: object,
    norm_length: object,
) -> None:
    """Refuse arguments that differ in type, shape, dtype or device from the docstring. Raises ValueError."""
    checks.tensor(OP, "logp", logp, shape=(None,))
    checks.offsets(OP, cu_seqlens, logp)
    n, sequences = logp.shape[0], cu_seqlens.shape[0] - 1
    checks.rows(OP, logp, sequences, advantage=advantage)
    checks.rows(OP, logp, n, **columns)
    if mask is not None:
        checks.mask(OP, mask, n, logp)
    if isinstance(denominator, Tensor):
        checks.scalar(OP, "denominator", denominator, logp)
    elif denominator is not None:
        checks.number(OP, "denominator", denominator, low=0.0)
    if isinstance(norm_length, Tensor):
        checks.scalar(OP, "norm_length", norm_length, logp)
