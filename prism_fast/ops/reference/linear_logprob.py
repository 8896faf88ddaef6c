"""Token log-probabilities straight from hidden states, in blocks of rows so that [N, V] is held at most once."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..results import LogProb
from . import softmax_rows as rows

# Scores of one block: on a CPU they should stay in the cache between the passes over them (measured best of 1..64 MiB),
# elsewhere the matrix product wants to be large.
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_ELSEWHERE = 256 << 20
MIN_BLOCK_ROWS = 128


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
    save: bool,
    weight_grad_out: Tensor | None,
) -> LogProb:
    """See ``prism_fast.ops.linear_logprob``. ``save``: keep the scaled scores for the backward pass."""
    return LogProb(
        *_LinearLogProb.apply(
            hidden, weight, bias, target, temperature, softcap, entropy, ignore_index, save, weight_grad_out
        )
    )


def block_rows(vocabulary: int, like: Tensor) -> int:
    """Rows per block."""
    room = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES_ELSEWHERE)
    return max(MIN_BLOCK_ROWS, room // (vocabulary * like.element_size()))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, softcap, entropy, ignore_index, save, weight_grad_out):
        n, vocabulary = hidden.shape[0], weight.shape[0]
        column, ignored, outside = rows.target_rows(target, vocabulary, ignore_index)
        x, w, b = _lifted(hidden, weight, bias)
        heat = rows.temperature_rows(temperature, n, x)
        step = block_rows(vocabulary, x)
        logp, log_sum, top = x.new_empty(n), x.new_empty(n), x.new_empty(n, 1)
        entropies = x.new_empty(n if entropy else 0)
        kept: list[Tensor] = []
        for at in range(0, n, step):
            block = slice(at, min(n, at + step))
            z, top[block] = rows.shifted_(_scores(x[block], w, b), heat[block], softcap)
            logp[block], log_sum[block], found = rows.statistics(z, column[block], entropy)
            if entropy:
                entropies[block] = found
            if save:
                kept.append(z)
        ctx.save_for_backward(hidden, weight, bias, column, ignored, outside, heat, log_sum, entropies, top, *kept)
        ctx.softcap, ctx.entropy, ctx.step, ctx.weight_grad_out = softcap, entropy, step, weight_grad_out
        ctx.set_materialize_grads(False)
        return rows.finish(logp, entropies, ignored, outside)

    @staticmethod
    @once_differentiable
    def backward(ctx, logp_grad, entropy_grad):
        hidden, weight, bias, column, ignored, outside, heat, log_sum, entropies, top, *kept = ctx.saved_tensors
        x, w, b = _lifted(hidden, weight, bias)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        g = rows.upstream(logp_grad, log_sum, ignored)
        g = torch.where(outside & (g != 0.0), math.nan, g)
        ge = rows.upstream(entropy_grad, log_sum, ignored) if ctx.entropy and entropy_grad is not None else None
        into = ctx.weight_grad_out
        dx = torch.empty_like(x) if want_hidden else None
        dw = (torch.zeros_like(w) if into is None else into) if want_weight else None
        db = torch.zeros_like(b) if want_bias else None
        # A row without upstream gradient must add nothing, even where its hidden state is not finite.
        active = g != 0.0 if ge is None else (g != 0.0) | (ge != 0.0)
        for number, at in enumerate(range(0, x.shape[0], ctx.step)):
            block = slice(at, min(x.shape[0], at + ctx.step))
            z = kept[number] if kept else rows.shifted_(_scores(x[block], w, b), heat[block], ctx.softcap)[0]
            dz = rows.gradient_(
                z,
                column[block],
                log_sum[block],
                g[block],
                None if ge is None else ge[block],
                entropies[block],
                heat[block],
                ctx.softcap,
                top[block],
            )
            if want_hidden:
                torch.mm(dz, w, out=dx[block])
            if want_weight:
                dw.addmm_(dz.t().to(dw.dtype), torch.where(active[block, None], x[block], 0.0).to(dw.dtype))
            if want_bias:
                db += dz.sum(0)
        return (
            dx.to(hidden.dtype) if want_hidden else None,
            dw.to(weight.dtype) if want_weight and into is None else None,
            db.to(bias.dtype) if want_bias else None,
            *[None] * 7,
        )


def _lifted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in float32 (float64 for float64): products of half-precision numbers are then exact."""
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind)


def _scores(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """[n, V] raw scores of a block. An autocast region must not take the float32 back."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ w.t() if b is None else torch.addmm(b, x, w.t())
