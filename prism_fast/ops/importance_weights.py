"""Importance weights between rollout engine and trainer."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .backend import choose
from .reference.importance_weights import importance_weights as reference
from .results import ImportanceWeights

OP = "importance_weights"
BACKENDS = ("reference",)
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_weights(
    rollout_logp: Tensor,
    logp: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str,
    low: float,
    high: float,
    backend: str | None = None,
) -> ImportanceWeights:
    """Factors for ``policy_loss(is_weight=...)`` from the ratio of trainer to rollout probability, without gradient.

    Args:
        rollout_logp: [N] floating, log-probabilities of the sampled tokens as the rollout engine reported them, nats.
        logp: [N] floating, the trainer's log-probabilities of the same tokens under the same weights.
        cu_seqlens: [B+1] int32 offsets; tokens past the last offset are padding and get weight 0.
        mode: ``token_*``: ratio exp(clamp(logp - rollout_logp, -20, 20)) per token. ``sequence_*``: one ratio per
            sequence, exp(clamp(sum, -20, 20)), given to all its tokens. ``*_truncate``: clamped to [low, high].
            ``*_mask``: 0 outside [low, high].
        low, high: 0 <= low <= high; low = 0 bounds from above only.
        backend: None or "reference".

    Returns:
        ImportanceWeights(weight [N], effective_sample_size, masked_fraction, clipped_fraction), float32 (float64 for
        float64 ``logp``); the three numbers count tokens or, in sequence modes, non-empty sequences. The fractions
        are NaN where there is nothing to count; a NaN ratio gives NaN weights.

    Raises:
        ValueError: wrong shape, dtype, device, mode or bounds.

    Cost: some passes of PyTorch over N numbers; there is no kernel of its own.

    Sources: truncated importance sampling as in verl's rollout correction; token masking of IcePop; sequence masking
    as in TRL ``vllm_importance_sampling_mode``.
    """
    checks.tensor(OP, "logp", logp, shape=(None,))
    checks.tensor(OP, "rollout_logp", rollout_logp, shape=(logp.shape[0],), like=logp)
    checks.offsets(OP, cu_seqlens, logp)
    checks.choice(OP, "mode", mode, MODES)
    checks.number(OP, "low", low, low=0.0)
    checks.number(OP, "high", high, low=low)
    choose(OP, BACKENDS, backend, logp)
    return reference(rollout_logp, logp, cu_seqlens, mode=mode, low=low, high=high)
