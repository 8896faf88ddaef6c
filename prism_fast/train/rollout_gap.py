"""The gap between the log-probs of the rollout engine and the trainer's: importance weights against it, and an alarm.

Both sides compute with the same weights, but not with the same kernels. Rounding gives a small, steady gap; a weight
that did not reach the engine gives one that grows from push to push, and raises nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.config import RolloutConfig
from prism_fast.engine.protocol import Engine
from prism_fast.track.metrics import Metrics

#: By ``rollout.importance``: mode of `ops.importance_weights`, and the lowest weight for a threshold C.
MODES: dict[str, tuple[str, Callable[[float], float]]] = {
    "truncated": ("token_truncate", lambda c: 0.0),
    "masked": ("token_mask", lambda c: 1 / c),
    "sequence_masked": ("sequence_mask", lambda c: 1 / c),
}
#: (``rollout.gap_warn``, ``rollout.gap_stop``) where the recipe leaves them open, nats. Rounding gives 1e-6 in float32
#: and some hundredths in bfloat16; a tied output matrix that was left behind gave 0.1 and more in both.
LIMITS = {torch.float32: (1e-4, 0.02)}
LIMITS_HALF = (0.05, 0.5)
GAP = "rollout/logprob_gap_mean"


class RolloutGapError(RuntimeError):
    """The rollout engine samples from another distribution than the trainer computes."""


class RolloutGap:
    """Of one stage.

    Args:
        dtype: of the policy's forward.
        tell: takes a warning.
        alarm: whether the gap has limits. A replay has none: another policy may have sampled what it reads.
    """

    def __init__(
        self, config: RolloutConfig, dtype: torch.dtype, *, tell: Callable[[str], None], alarm: bool = True
    ) -> None:
        self.corrects = config.importance != "off"
        self._kind, self._threshold = config.importance, config.importance_threshold
        limits = LIMITS.get(dtype, LIMITS_HALF)
        self._warn = limits[0] if config.gap_warn is None else config.gap_warn
        self._stop = limits[1] if config.gap_stop is None else config.gap_stop
        self._tell, self._alarm, self._told = tell, alarm, 0.0

    def weights(self, sampled: Tensor, logp: Tensor, cu_seqlens: Tensor, metrics: Metrics) -> Tensor:
        """Factors [N] of the policy loss for log-probs of the engine and of the trainer, both [N], of on-policy
        responses with offsets ``cu_seqlens`` [B+1]; every response has a token."""
        mode, low = MODES[self._kind]
        found = ops.importance_weights(
            sampled, logp, cu_seqlens, mode=mode, low=low(self._threshold), high=self._threshold
        )
        each = found.weight if mode.startswith("token") else found.weight[cu_seqlens[:-1].long()]
        share = found.clipped_fraction if mode.endswith("truncate") else found.masked_fraction
        name = "truncated" if mode.endswith("truncate") else "masked"
        each, count = each.double(), each.numel()
        metrics.mean(f"importance/{name}_share", share.double() * count, count)
        metrics.mean("importance/weight_mean", each.sum(), count)
        metrics.mean("importance/weight_square", each.square().sum(), count)
        return found.weight

    def check(self, engine: Engine, metrics: Metrics) -> Metrics:
        """Joint. Look at the gap of an update's on-policy tokens, whose ``metrics`` a rank gives; returns more of them.

        Raises:
            RolloutGapError: the mean over all ranks exceeds ``rollout.gap_stop``. The gradients are dropped.
        """
        rows = {name: (sum(values), sum(counts)) for name, _, values, counts in metrics.state()}
        gap, tokens = rows.get(GAP, (0.0, 0))
        weight, units = rows.get("importance/weight_mean", (0.0, 0))
        square, _ = rows.get("importance/weight_square", (0.0, 0))
        gap, tokens, weight, square, units = engine.sum([gap, tokens, weight, square, units])
        found = Metrics()
        if units:  # (sum w)^2 / sum w^2, as a share of the tokens or responses that have a weight
            found.last("importance/effective_share", weight**2 / (units * square) if square else 0.0)
        if tokens and self._alarm:
            self._judge(engine, gap / tokens)
        return found

    def _judge(self, engine: Engine, gap: float) -> None:
        text = (
            f"{engine.where}: the rollout engine's log-probs differ from the trainer's by {gap:.3g} nats per token in "
            "the mean"
        )
        cause = (
            "weights that a push did not bring there, or kernels that compute something else; a gap that grows from "
            "step to step is the former"
        )
        if not gap <= self._stop:
            engine.discard()
            raise RolloutGapError(
                f"{text}, more than rollout.gap_stop={self._stop:g}. Causes: {cause}. Compare with rollout.engine=hf; "
                "where the gap is steady, raise rollout.gap_stop and correct for it: rollout.importance=truncated"
            )
        if gap > max(self._warn, 2 * self._told):
            self._told = gap
            self._tell(f"{text} (rollout.gap_warn={self._warn:g}). Causes: {cause}")
