"""Policy loss straight from hidden states: ``linear_logprob`` and ``policy_loss`` as one op."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .backend import choose
from .linear_logprob import linear_logprob
from .policy_loss import policy_loss
from .results import PolicyStats

OP = "linear_policy_loss"
BACKENDS = ("reference",)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
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
    entropy: bool = False,
    entropy_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    kl: str = "k3",
    kl_coef: float = 0.0,
    is_weight: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    weight_grad_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """``policy_loss`` of the log-probabilities that ``linear_logprob`` gives for the same rows.

    Args:
        hidden [N, H], weight [V, H], target [N], bias, temperature, softcap, ignore_index, weight_grad_out: as in
            ``linear_logprob``; rows with ``ignore_index`` are inactive, beside those that ``mask`` excludes.
        entropy: report the mean entropy; ``entropy_coef`` != 0 computes it in any case.
        All others: as in ``policy_loss``.
        backend: None or "reference". The reference composes the two ops and forms the scores again in backward, so that
            [N, V] is never held.

    Returns:
        (loss 0-d, PolicyStats), as ``policy_loss``.

    Raises:
        ValueError, NotImplementedError: as ``linear_logprob`` and ``policy_loss``.

    Sources: those of the two ops.
    """
    choose(OP, BACKENDS, backend, hidden)
    checks.tensor(OP, "target", target, shape=(None,), dtypes=checks.INTEGERS)
    with_entropy = entropy or entropy_coef != 0.0
    result = linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        entropy=with_entropy,
        ignore_index=ignore_index,
        save="recompute",
        weight_grad_out=weight_grad_out,
        backend="reference",
    )
    kept = target != ignore_index
    if mask is not None:
        checks.mask(OP, mask, target.shape[0], hidden)
        kept = kept & (mask != 0)
    return policy_loss(
        result.logp,
        advantage,
        cu_seqlens,
        old_logp=old_logp,
        token_advantage=token_advantage,
        loss=loss,
        clip=clip,
        delta=delta,
        dual_clip=dual_clip,
        sapo_temperature=sapo_temperature,
        aggregation=aggregation,
        denominator=denominator,
        norm_length=norm_length,
        entropy=result.entropy if with_entropy else None,
        entropy_coef=entropy_coef,
        ref_logp=ref_logp,
        kl=kl,
        kl_coef=kl_coef,
        is_weight=is_weight,
        mask=kept,
        backend="reference",
    )
