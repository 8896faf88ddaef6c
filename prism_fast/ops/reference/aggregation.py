"""Aggregation of per-token losses to one number: the weight of each token and the default denominator."""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_MEAN = "token_mean"
SEQ_MEAN_TOKEN_MEAN = "seq_mean_token_mean"
SEQ_MEAN_TOKEN_SUM = "seq_mean_token_sum"
SEQ_MEAN_TOKEN_SUM_NORM = "seq_mean_token_sum_norm"
AGGREGATIONS = (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM)

# Aggregations that a loss allows: first the default, from its paper, and none that contradicts the paper.
OF_LOSS = {
    "grpo": (SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM),
    "dapo": (TOKEN_MEAN,),
    "gspo": (SEQ_MEAN_TOKEN_MEAN,),
    "gspo_token": (SEQ_MEAN_TOKEN_MEAN,),
    "dr_grpo": (SEQ_MEAN_TOKEN_SUM_NORM,),
    "bnpo": (TOKEN_MEAN,),
    "cispo": (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN),
    "sapo": (SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN),
}
LOSSES = tuple(OF_LOSS)


def default_denominator(aggregation: str, lengths: Tensor) -> Tensor:
    """0-d count, the denominator of a call without one; ``lengths`` [B]: active tokens of each sequence."""
    count = lengths.sum() if aggregation == TOKEN_MEAN else (lengths > 0).sum()
    return count.to(lengths.dtype)


def token_weights(
    aggregation: str,
    active: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    denominator: Tensor,
    norm_length: float | Tensor | None,
) -> Tensor:
    """[N] factor of each token's loss, 0 on inactive tokens; the aggregated loss is the plain sum of the products.

    ``lengths`` [B + 1] are the active tokens of each sequence, the last entry being the padding's. A denominator of 0
    (nothing to learn from) counts as 1, so that an empty call gives 0 and not NaN.
    """
    each = torch.where(denominator == 0, 1.0, 1.0 / denominator)
    if aggregation == SEQ_MEAN_TOKEN_MEAN:
        each = (each / lengths.clamp(min=1.0))[sequence]
    elif aggregation == SEQ_MEAN_TOKEN_SUM_NORM:
        each = each / norm_length
    return torch.where(active, each, 0.0)
