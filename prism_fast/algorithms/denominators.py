"""The global count that a loss divides by, computed once per optimizer step, before the first micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_fast.ops.reference.aggregation import AGGREGATIONS, OF_LOSS, TOKEN_MEAN


def loss_denominator(loss: str, lengths: Tensor, *, aggregation: str | None = None) -> Tensor:
    """0-d float32 ``denominator`` of ``policy_loss``; over several ranks, all-reduce (sum) the result.

    Args:
        loss: name of the loss, which fixes the default aggregation.
        lengths: [B] integer, active (unmasked) response tokens of every sequence of the whole step.
        aggregation: as in ``policy_loss``. ``token_mean`` counts tokens, the others sequences with an active token.

    Raises:
        ValueError: unknown loss or aggregation, or a pair that ``policy_loss`` refuses.

    Source: the table in the docstring of ``policy_loss``.
    """
    if loss not in OF_LOSS:
        raise ValueError(f"loss_denominator: loss={loss!r} is not one of {', '.join(map(repr, OF_LOSS))}")
    aggregation = OF_LOSS[loss][0] if aggregation is None else aggregation
    if aggregation not in OF_LOSS[loss]:
        known = "an unknown aggregation" if aggregation not in AGGREGATIONS else "not what this loss divides by"
        raise ValueError(f"loss_denominator: loss={loss!r} with aggregation={aggregation!r}: {known}")
    count = lengths.sum() if aggregation == TOKEN_MEAN else (lengths > 0).sum()
    return count.to(torch.float32)
