"""linear_logprob by the Triton kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import budgets
from ..bad_values import counted
from ..forms import TwoForms, saved_once
from ..reference import softmax_rows
from ..results import LogProb
from .head import STATISTICS_ROWS, Rows, temperature_rows

if TYPE_CHECKING:
    from prism_fast.kernels.logprob import Scores


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
    """See ``prism_fast.ops.linear_logprob``. ``save``: keep the exponentials of the scores for the backward pass."""
    temperature = temperature_rows(temperature, hidden)
    arguments = (hidden, weight, bias, target, temperature, weight_grad_out, softcap, entropy, ignore_index, save)
    return LogProb(*_forms(*arguments)[:2])


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    weight_grad_out: Tensor | None,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or [0], row maximum, log-sum, own score, kept, tile maxima).

    The last five are empty unless saved. Some arguments are for backward alone.
    """
    rows = Rows(hidden, weight, bias, target, temperature, softcap, entropy)
    n = hidden.shape[0]
    _, ignored, outside = softmax_rows.target_rows(target, weight.shape[0], ignore_index)
    outside = counted(outside)
    step = max(n, 1) if save else STATISTICS_ROWS
    found = [rows.forward(slice(at, min(n, at + step)), save) for at in range(0, max(n, 1), step)]
    logp, entropies = softmax_rows.finish(_joined(found, "logp"), _joined(found, "entropy"), ignored, outside)
    nothing = logp.new_empty(0)
    entropies = entropies if entropy else nothing.clone()
    if not save:
        return logp, entropies, *(nothing.clone() for _ in range(3)), hidden.new_empty(0), nothing
    (whole,) = found
    return logp, entropies, whole.row_max, whole.log_sum, whole.own, whole.kept, whole.tile_max


def _run_backward(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    logp: Tensor,
    entropies: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    own: Tensor,
    kept: Tensor | None,
    tile_max: Tensor,
    weight_grad_out: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, [0] where not wanted. Overwrites ``kept``; adds to ``weight_grad_out``."""
    n, vocabulary = hidden.shape[0], weight.shape[0]
    entropy = entropies.shape[0] == n and entropy_grad is not None
    _, ignored, outside = softmax_rows.target_rows(target, vocabulary, ignore_index)
    g = softmax_rows.upstream(logp_grad, logp, ignored)
    g = torch.where(outside & (g != 0.0), math.nan, g).contiguous()
    h = softmax_rows.upstream(entropy_grad, logp, ignored).contiguous() if entropy else None
    rows = Rows(hidden, weight, bias, target, temperature, softcap, entropy)
    saved = kept is not None
    step = max(n, 1) if saved else budgets.wave_rows(n, vocabulary, hidden)
    rows.prepare((want_hidden, want_weight, want_bias), weight_grad_out)
    for at in range(0, n, step):
        block = slice(at, min(n, at + step))
        if saved:
            found = _found(row_max, log_sum, logp, entropies if entropy else logp, own, kept, tile_max, rows)
        else:
            found = rows.forward(block, keep=True)
        rows.backward(block, found, g[block], None if h is None else h[block])
        del found  # the next wave reuses its memory
    found = rows.gradients(with_weight=weight_grad_out is None)
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


def _joined(found: list[Scores], name: str) -> Tensor:
    parts = [getattr(part, name) for part in found]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _found(row_max, log_sum, logp, entropies, own, kept, tile_max, rows: Rows) -> Scores:
    from prism_fast.kernels import logprob

    width = logprob.tile_width(rows.hidden, rich=rows.softcap is not None)
    return logprob.Scores(row_max, log_sum, logp, entropies, own, kept, tile_max, width)


def _fake(hidden, weight, bias, target, temperature, weight_grad_out, softcap, entropy, ignore_index, save):
    n, vocabulary = hidden.shape[0], weight.shape[0]
    wide = {"dtype": torch.float32}
    kept = m = hidden.new_empty(0)
    if save:
        from prism_fast.kernels import logprob

        width = logprob.tile_width(hidden, rich=softcap is not None)
        kept = logprob.keep_buffer(n, vocabulary, hidden)
        m = hidden.new_empty((-(-vocabulary // width), n))
    statistics = n if save else 0
    return (
        hidden.new_empty(n, **wide),
        hidden.new_empty(n if entropy else 0, **wide),
        *(hidden.new_empty(statistics, **wide) for _ in range(3)),
        kept,
        torch.empty_like(m, **wide),
    )


_backward_operator = torch.library.custom_op(
    "prism_fast::linear_logprob_backward", _run_backward, mutates_args=("kept", "weight_grad_out")
)


@_backward_operator.register_fake
def _(logp_grad, entropy_grad, hidden, weight, bias, *rest):
    weight_grad_out, (want_hidden, want_weight, want_bias) = rest[9], rest[-3:]
    nothing = hidden.new_empty
    return (
        torch.empty_like(hidden) if want_hidden else nothing(0),
        torch.empty_like(weight) if want_weight and weight_grad_out is None else nothing(0),
        torch.empty_like(bias) if want_bias else nothing(0),
    )


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, target, temperature, weight_grad_out, softcap, _, ignore_index, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, target, temperature, *output)
    # Not through save_for_backward, which forbids the writes to it between forward and backward.
    ctx.weight_grad_out, ctx.options = weight_grad_out, (softcap, ignore_index)


def _gradients(ctx, traced: bool, logp_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    wants, into = ctx.needs_input_grad[:3], ctx.weight_grad_out
    *saved, kept, tile_max = saved_once(ctx, "linear_logprob", "pass save='recompute' to call it again")
    kept = kept if kept.dim() == 2 else None  # the operator counts as a writer of any tensor that it gets here
    arguments = (logp_grad, entropy_grad, *saved, kept, tile_max, into, *ctx.options)
    found = (_backward_operator if traced else _run_backward)(*arguments, *wants)
    if kept is not None and not traced:
        # Autograd does not see the kernels' writes; the new version makes a second backward raise.
        torch.autograd.graph.increment_version(kept)
    given = (wants[0], wants[1] and into is None, wants[2])
    return tuple(x if there else None for x, there in zip(found, given, strict=True))


_forms = TwoForms(
    "prism_fast::linear_logprob",
    _run,
    backend="triton",
    fake=_fake,
    leading=3,
    results=2,
    save=_save,
    gradients=_gradients,
)
