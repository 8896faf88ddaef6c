"""Token log-probabilities from logits that already exist, in chunks of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bad_values import counted
from ..forms import plain, refuse_duals, refuse_graph
from ..results import LogProb
from . import softmax_rows as rows


def selected_logprob(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor, entropy: bool, ignore_index: int
) -> LogProb:
    """See ``prism_fast.ops.selected_logprob``. Keeps the logits and three numbers per row for backward."""
    if plain(logits):
        refuse_duals("selected_logprob", "reference", logits)
    return LogProb(*_SelectedLogProb.apply(logits, target, temperature, entropy, ignore_index))


class _SelectedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature, entropy, ignore_index):
        n, vocabulary = logits.shape
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        column, ignored, outside = rows.target_rows(target, vocabulary, ignore_index)
        outside = counted(outside)
        logp, log_sum = logits.new_empty(n, dtype=kind), logits.new_empty(n, dtype=kind)
        entropies = logits.new_empty(n if entropy else 0, dtype=kind)
        temperature = rows.temperature_rows(temperature, n, logp)
        step = rows.chunk_rows(vocabulary, logp)
        for at in range(0, n, step):
            block = slice(at, min(n, at + step))
            z = logits[block].to(kind, copy=True)
            logp[block], log_sum[block], found, *_ = rows.exponentials_(
                z, column[block], temperature[block], None, entropy
            )
            if entropy:
                entropies[block] = found
        ctx.save_for_backward(logits, column, ignored, outside, temperature, log_sum, entropies)
        ctx.step = step
        ctx.set_materialize_grads(False)
        return rows.finish(logp, entropies, ignored, outside)

    @staticmethod
    def backward(ctx, logp_grad, entropy_grad):
        refuse_graph("selected_logprob", "reference")
        logits, column, ignored, outside, temperature, log_sum, entropies = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        g = rows.upstream(logp_grad, log_sum, ignored)
        g = torch.where(outside & (g != 0.0), math.nan, g)
        has_entropy = entropies.shape == g.shape and entropy_grad is not None
        ge = rows.upstream(entropy_grad, log_sum, ignored) if has_entropy else None
        gradient = torch.empty_like(logits)
        for at in range(0, logits.shape[0], ctx.step):
            block = slice(at, min(logits.shape[0], at + ctx.step))
            z = logits[block].to(log_sum.dtype, copy=True)
            *_, top, own = rows.exponentials_(z, column[block], temperature[block], None, entropy=False)
            factor = rows.gradient_(
                z,
                column[block],
                own,
                log_sum[block],
                g[block],
                None if ge is None else ge[block],
                entropies[block],
                temperature[block],
                None,
                top,
            )
            gradient[block] = z.mul_(factor)
        return gradient, None, None, None, None
