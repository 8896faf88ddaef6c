"""Losses over a head whose gradients are formed inside the forward pass.

A token's upstream gradient depends on its own log-probability alone (for GSPO on those of its sequence), because every
denominator of the losses is known beforehand. So each wave of rows turns its scores into gradients at once: three
matrix passes, and never more than one wave of scores in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import budgets
from .bad_values import counted
from .forms import refuse_graph
from .reference import softmax_rows
from .results import PolicyStats

if TYPE_CHECKING:
    from .reference import linear_logprob as of_reference
    from .triton import head as of_triton

    Rows = of_reference.Rows | of_triton.Rows

Policy = Callable[[Tensor, Tensor | None], tuple[Tensor, PolicyStats]]  # (logp [N], entropy [N] or None) -> loss, stats


def cuts(rows: int, step: int, borders: Sequence[int] | None) -> list[tuple[int, int]]:
    """[start, end) of waves of about ``step`` rows; with ``borders`` (offsets of sequences) no sequence is cut.

    A wave holds as many whole sequences as fit, and at least one. Rows past the last border are padding.
    """
    if borders is None:
        return [(at, min(rows, at + step)) for at in range(0, rows, step)]
    waves, start, last = [], 0, 0
    for border in borders:
        if border - start > step and last > start:
            waves.append((start, last))
            start = last
        last = border
    if last > start:
        waves.append((start, last))
    return waves + [(at, min(rows, at + step)) for at in range(last, rows, step)]


def open_rows(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
) -> tuple[Callable[[], Rows], int]:
    """(constructor of the head's `Rows` for the backend, number of rows per wave)."""
    n, vocabulary = hidden.shape[0], weight.shape[0]
    if backend == "triton":
        from .triton.head import Rows, temperature_rows

        step, column = budgets.wave_rows(n, vocabulary, hidden), target
        temperature = temperature_rows(temperature, hidden)
    else:
        from .reference.linear_logprob import Rows, block_rows

        step = block_rows(vocabulary, hidden)
        column, _, _ = softmax_rows.target_rows(target, vocabulary, ignore_index)
        temperature = softmax_rows.temperature_rows(temperature, n, hidden.new_empty(0, dtype=wide(hidden)))
    return lambda: Rows(hidden, weight, bias, column, temperature, softcap, entropy), step


def run(
    op: str,
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    make_rows: Callable[[], Rows],
    walk: Callable[[Rows, bool], tuple[Tensor, ...]],
    weight_grad_out: Tensor | None,
) -> tuple[Tensor, ...]:
    """The results of ``walk`` for the head's rows; the first is a loss with gradients for hidden, weight and bias.

    ``walk(head, learns)`` goes over the rows and, with ``learns``, passes every wave to ``head.backward``.
    ``weight_grad_out``, if given, receives the weight's gradient during this call. Backward must then be called with
    the gradient 1; any other gives NaN, because the added gradient can no longer be scaled. ``op`` and ``backend`` are
    for the error that refuses second derivatives.
    """
    learns = torch.is_grad_enabled()
    wants = tuple(learns and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _FormedInForward.apply(hidden, weight, bias, make_rows, walk, weight_grad_out, wants, (op, backend))


class _FormedInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, make_rows, walk, weight_grad_out, wants, caller):
        head = make_rows()
        if any(wants):
            head.prepare(wants, weight_grad_out)
        loss, *others = walk(head, any(wants))
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.added, ctx.caller = weight_grad_out is not None and wants[1], caller
        if any(wants):
            ctx.save_for_backward(*head.gradients(with_weight=weight_grad_out is None))
        return loss, *others

    @staticmethod
    def backward(ctx, loss_grad, *_):
        refuse_graph(*ctx.caller)
        if loss_grad is None:
            return (None,) * 8
        if ctx.added:
            loss_grad = torch.where(loss_grad == 1.0, 1.0, torch.nan)
        saved = ctx.saved_tensors
        if loss_grad.device.type != "cpu" or loss_grad != 1.0:  # on a CPU, reading the value costs nothing
            saved = [None if x is None else _scaled(x, loss_grad) for x in saved]
        return *saved, *[None] * 5


def _scaled(x: Tensor, loss_grad: Tensor) -> Tensor:
    """``x * loss_grad`` in the dtype of ``x``; 0 times an overflow of float16 is 0."""
    found = (x * loss_grad).to(x.dtype)
    return found.masked_fill_(x.isinf() & (loss_grad == 0.0), 0.0) if x.dtype == torch.float16 else found


def policy_walk(
    policy: Policy,
    waves: Sequence[tuple[int, int]],
    target: Tensor,
    vocabulary: int,
    ignore_index: int,
    with_entropy: bool,
    logp_out: Tensor | None,
) -> Callable[[Rows, bool], tuple[Tensor, ...]]:
    """A walk for `run` that gives ``policy``'s loss and statistics; ``logp_out`` [N] receives the log-probabilities."""

    def walk(head: Rows, learns: bool) -> tuple[Tensor, ...]:
        # Rows whose wave is still to come keep their zeros; no gradient of an earlier wave depends on them.
        logp = head.hidden.new_zeros(target.shape[0], dtype=wide(head.hidden))
        entropy = torch.zeros_like(logp) if with_entropy else None
        _, ignored, outside = softmax_rows.target_rows(target, vocabulary, ignore_index)
        outside = counted(outside)
        for start, end in waves:
            block = slice(start, end)
            found = head.forward(block, keep=learns)
            of_block = softmax_rows.finish(found.logp, found.entropy, ignored[block], outside[block])
            logp[block] = of_block[0]
            if with_entropy:
                entropy[block] = of_block[1]
            if learns:
                g, h = _upstream(policy, logp, entropy)
                head.backward(block, found, g[block], None if h is None else h[block])
            del found  # the next wave reuses its memory
        if logp_out is not None:
            logp_out.copy_(logp)
        loss, stats = policy(logp, entropy)
        return loss, *stats

    return walk


def wide(x: Tensor) -> torch.dtype:
    """The dtype of results computed from ``x``: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _upstream(policy: Policy, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients [N] of the loss with respect to log-probabilities and entropies (None if it does not use them)."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logp, entropy) if x is not None]
        loss, _ = policy(leaves[0], leaves[1] if entropy is not None else None)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    g = torch.zeros_like(logp) if found[0] is None else found[0]
    return g, found[1] if entropy is not None else None
