"""Policy-gradient losses of the GRPO family on packed sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .backend import choose, takes_native
from .reference.aggregation import LOSSES, OF_LOSS, SEQ_MEAN_TOKEN_SUM_NORM
from .reference.policy_loss import policy_loss as reference
from .results import PolicyStats

OP = "policy_loss"
BACKENDS = ("reference", "native")
KL = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CLIP_OF_LOSS = {
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "gspo_token": (3e-4, 4e-4),
    "dr_grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2),
    "cispo": (1.0, 4.0),
}
TWO_SIDED = ("grpo", "dapo", "dr_grpo", "bnpo")
ELSEWHERE = {
    "vanilla": "use loss='grpo' with aggregation='token_mean'",
    "gpg": "it has no ratio: use loss='grpo' with old_logp=None, which has the same gradient",
    "geo_mean": "its geometric mean clips inside the sequence product; use loss='gspo'",
}
KL_ELSEWHERE = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "kl+": "k1+", "low_var_kl+": "k3+", "mse+": "k2"}


def policy_loss(
    logp: Tensor,
    advantage: Tensor | None,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    token_advantage: Tensor | None = None,
    loss: str = "grpo",
    clip: tuple[float, float] | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    sapo_temperature: tuple[float, float] = (1.0, 1.05),
    aggregation: str | None = None,
    denominator: Tensor | float | None = None,
    norm_length: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    kl: str = "k3",
    kl_coef: float = 0.0,
    is_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Loss of packed response tokens: policy term + ``kl_coef`` * KL - ``entropy_coef`` * entropy, aggregated alike.

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

    Args:
        logp: [N] floating, log-probabilities under the policy in nats; the only input with a gradient beside
            ``entropy``.
        advantage: [B] floating, or None with ``token_advantage``.
        cu_seqlens: [B+1] int32 offsets; sequences may be empty; tokens past the last offset are padding.
        old_logp: [N]; None = on-policy, the ratio is 1 by construction and its gradient is that of logp.
        token_advantage: [N] floating instead of ``advantage``; refused by ``gspo``.
        loss, aggregation: see above. grpo accepts every aggregation, cispo and sapo both means, the others only theirs.
        clip: (lo, hi), both >= 0. Not for sapo.
        dual_clip: > 1; where A < 0 the loss is at most -A * dual_clip (arXiv 1912.09729). grpo, dapo, dr_grpo, bnpo.
        delta: > 1 + hi; the same bound under the name of two-sided clipping (INTELLECT-2, arXiv 2505.07291).
        sapo_temperature: (t for A > 0, t for A <= 0), both > 0.
        denominator: number or 0-d tensor, the *global* count of the table. Given it, any micro-batching, packing or
            rank count gives the same gradient. None counts this call. 0 counts as 1.
        norm_length: number or 0-d tensor, the constant length of dr_grpo (the longest response allowed), tokens.
        entropy: [N] floating, nats. ``entropy_coef`` needs it; alone it is only reported.
        ref_logp: [N] of a reference policy. ``kl_coef`` needs it; alone it is only reported.
        kl: k1 = logp - ref; abs = |k1|; k2 = k1^2 / 2; k3 = exp(k) - k - 1 with k = clamp(-k1, -20, 20), clamped to
            [-10, 10] with gradient 0 where a clamp acts. k1+, abs+, k3+: straight through, the value of the form with
            the gradient of k2, also where a clamp acts.
        is_weight: [N] floating factors of the policy term, see ``importance_weights``.
        mask: [N] bool or floating (0 = inactive). Inactive tokens may hold NaN; they get gradient exactly 0.
        backend: None, "reference" or "native" (differentiable once).

    Returns:
        (loss 0-d float32, or float64 for float64 ``logp``; PolicyStats). Without an active token the loss is 0.

    Raises:
        ValueError: wrong shape, dtype, device or option, or options that contradict each other.
        NotImplementedError: published losses and KL forms that are left out, naming what to use.
        RuntimeError: the backend is missing on this machine.

    Sources: GRPO arXiv 2402.03300 eq. 3; DAPO 2503.14476 eq. 8; GSPO 2507.18071 eq. 5 and 14; Dr. GRPO 2503.20783;
    CISPO 2506.13585 eq. 4 (bounds of ScaleRL, 2510.13786); SAPO 2511.20347; bnpo as in TRL; clamps, dual clip and the
    form of GSPO as in verl ``compute_policy_loss_vanilla`` and ``compute_policy_loss_gspo``.
    """
    has_norm, eager = norm_length is not None, None
    if torch.compiler.is_compiling():  # compilers look through caches, with a warning
        aggregation = resolve_options(
            loss, clip, delta, dual_clip, sapo_temperature, aggregation, has_norm, kl, entropy_coef, kl_coef
        )
    else:
        aggregation, eager = _settled(
            loss, clip, delta, dual_clip, sapo_temperature, aggregation, has_norm, denominator is not None, kl,
            entropy_coef, kl_coef,
        )  # fmt: skip
    if (advantage is None) == (token_advantage is None):
        raise ValueError(f"{OP}: pass exactly one of advantage [B] and token_advantage [N]")
    if token_advantage is not None and loss == "gspo":
        raise ValueError(f"{OP}: loss='gspo' has one advantage per sequence; use loss='gspo_token'")
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"{OP}: entropy_coef={entropy_coef} needs entropy")
    if kl_coef != 0.0 and ref_logp is None:
        raise ValueError(f"{OP}: kl_coef={kl_coef} needs ref_logp")
    if eager is not None and takes_native(backend):
        found = eager(
            logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask, denominator,
            norm_length, torch.is_grad_enabled(), torch.get_num_threads(),
        )  # fmt: skip
        if found is not None:
            return found
    columns = dict(
        old_logp=old_logp, token_advantage=token_advantage, entropy=entropy, ref_logp=ref_logp, is_weight=is_weight
    )
    _check(logp, advantage, cu_seqlens, columns, mask, denominator, norm_length)
    kernel = reference
    if choose(OP, BACKENDS, backend, logp) == "native":
        from prism_fast.ops.native.policy_loss import run as kernel
    return kernel(
        logp,
        advantage,
        cu_seqlens,
        old_logp=old_logp,
        token_advantage=token_advantage,
        loss=loss,
        clip=CLIP_OF_LOSS.get(loss) if clip is None else clip,
        delta=delta,
        dual_clip=dual_clip,
        sapo_temperature=sapo_temperature,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_logp=ref_logp,
        kl=kl,
        kl_coef=kl_coef,
        is_weight=is_weight,
        mask=mask,
    )


def _check(
    logp: object,
    advantage: object,
    cu_seqlens: object,
    columns: dict[str, object],
    mask: object,
    denominator: object,
    norm_length: object,
) -> None:
    """Refuse what is no tensor, or of another shape, dtype or device than the docstring says. Raises ValueError."""
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
    if norm_length is not None:
        checks.scalar(OP, "norm_length", norm_length, logp)


def resolve_options(
    loss: str,
    clip: tuple[float, float] | None,
    delta: float | None,
    dual_clip: float | None,
    sapo_temperature: tuple[float, float],
    aggregation: str | None,
    has_norm_length: bool,
    kl: str,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
) -> str:
    """Check the options that need no tensor and return the aggregation. Raises ValueError, NotImplementedError."""
    if loss in ELSEWHERE:
        raise NotImplementedError(f"{OP}: loss={loss!r} is not offered: {ELSEWHERE[loss]}")
    checks.choice(OP, "loss", loss, LOSSES)
    allowed = OF_LOSS[loss]
    aggregation = allowed[0] if aggregation is None else aggregation
    if aggregation not in allowed:
        raise ValueError(f"{OP}: loss={loss!r} with aggregation={aggregation!r}; it allows {', '.join(allowed)}")
    if (aggregation == SEQ_MEAN_TOKEN_SUM_NORM) != has_norm_length:
        need = "needs norm_length, the constant it divides by" if not has_norm_length else "does not use norm_length"
        raise ValueError(f"{OP}: aggregation={aggregation!r} {need}")
    if loss == "sapo" and clip is not None:
        raise ValueError(f"{OP}: loss='sapo' has no clip range; its softness is sapo_temperature")
    _, high = _pair("clip", CLIP_OF_LOSS.get(loss, (0.0, 0.0)) if clip is None else clip, strict=False)
    _pair("sapo_temperature", sapo_temperature, strict=True)
    if delta is not None and dual_clip is not None:
        raise ValueError(f"{OP}: delta and dual_clip are one bound under two names; pass one of them")
    for name, bound, least in (("delta", delta, 1.0 + high), ("dual_clip", dual_clip, 1.0)):
        if bound is not None:
            if loss not in TWO_SIDED:
                raise ValueError(f"{OP}: loss={loss!r} has no {name}; only {', '.join(TWO_SIDED)} have")
            checks.number(OP, name, bound, low=least, strict=True)
    if kl in KL_ELSEWHERE:
        raise ValueError(f"{OP}: kl={kl!r} is called {KL_ELSEWHERE[kl]!r} here")
    if kl == "k2+":
        raise ValueError(f"{OP}: kl='k2+' is kl='k2': straight through means the gradient of k2, which it has already")
    if kl == "full":
        raise NotImplementedError(f"{OP}: kl='full' needs both distributions over the vocabulary; use 'k3'")
    checks.choice(OP, "kl", kl, KL)
    checks.number(OP, "entropy_coef", entropy_coef)
    checks.number(OP, "kl_coef", kl_coef)
    return aggregation


@checks.once
def _settled(
    loss: str,
    clip: tuple[float, float] | None,
    delta: float | None,
    dual_clip: float | None,
    sapo_temperature: tuple[float, float],
    aggregation: str | None,
    has_norm_length: bool,
    has_denominator: bool,
    kl: str,
    entropy_coef: float,
    kl_coef: float,
) -> tuple[str, Callable | None]:
    """The aggregation, and the compiled form of an eager call with these options where there is one."""
    aggregation = resolve_options(
        loss, clip, delta, dual_clip, sapo_temperature, aggregation, has_norm_length, kl, entropy_coef, kl_coef
    )
    import prism_fast.ops.native as native

    if not native.available():
        return aggregation, None
    from prism_fast.ops.native.policy_loss import eager

    clip = CLIP_OF_LOSS.get(loss) if clip is None else clip
    options = (clip, delta, dual_clip, sapo_temperature, aggregation, has_denominator, kl, entropy_coef, kl_coef)
    return aggregation, eager(loss, *options)


def _pair(name: str, value: object, *, strict: bool) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{OP}: {name} must be a pair of numbers, got {value!r}")
    for part in value:
        checks.number(OP, name, part, low=0.0, strict=strict)
    return value[0], value[1]
