"""Policy loss of a head's log-probabilities with the gradients formed inside the forward pass.

A token's upstream gradient depends on its own log-probability alone (its sequence's, for GSPO), because every
normaliser of the losses is known beforehand. So the scores of a wave of rows can be turned into gradients while they
are there: three matrix passes, and never more than one wave of scores in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bad_values import counted
from .reference import softmax_rows
from .results import PolicyStats

if TYPE_CHECKING:
    from .reference.linear_logprob import Rows as ReferenceRows
    from .triton.head import Rows as TritonRows

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


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    make_rows: Callable[[], ReferenceRows | TritonRows],
    policy: Policy,
    waves: Sequence[tuple[int, int]],
    target: Tensor,
    ignore_index: int,
    with_entropy: bool,
    weight_grad_out: Tensor | None,
    logp_out: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Loss and statistics; the loss has gradients for hidden, weight and bias where these require them.

    The weight's gradient is added to ``weight_grad_out`` here and now, if that is given; backward has then to be called
    with the gradient 1, and gives NaN otherwise, because it could no longer scale what was added. ``logp_out`` [N]
    receives the log-probabilities.
    """
    learns = torch.is_grad_enabled()
    wants = tuple(learns and x is not None and x.requires_grad for x in (hidden, weight, bias))
    loss, *stats = _WavePolicyLoss.apply(
        hidden, weight, bias, make_rows, policy, waves, target, ignore_index, with_entropy, weight_grad_out, logp_out,
        wants,
    )  # fmt: skip
    return loss, PolicyStats(*stats)


class _WavePolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, make_rows, policy, waves, target, ignore_index, with_entropy, weight_grad_out,
        logp_out, wants,
    ):  # fmt: skip
        head = make_rows()
        n = hidden.shape[0]
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp = hidden.new_zeros(n, dtype=kind)  # rows that have not had their wave are not looked at
        entropy = torch.zeros_like(logp) if with_entropy else None
        _, ignored, outside = softmax_rows.target_rows(target, weight.shape[0], ignore_index)
        outside = counted(outside)
        if any(wants):
            head.prepare(wants, weight_grad_out)
        for start, end in waves:
            block = slice(start, end)
            found = head.forward(block, keep=any(wants))
            logp[block], spread = softmax_rows.finish(found.logp, found.entropy, ignored[block], outside[block])
            if with_entropy:
                entropy[block] = spread
            if any(wants):
                g, h = _upstream(policy, logp, entropy)
                head.backward(block, found, g[block], None if h is None else h[block])
            del found  # its memory serves the next wave
        if logp_out is not None:
            logp_out.copy_(logp)
        loss, stats = policy(logp, entropy)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.added = weight_grad_out is not None and wants[1]
        if any(wants):
            ctx.save_for_backward(*head.gradients(with_weight=weight_grad_out is None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad, *_):
        if loss_grad is None:
            return (None,) * 12
        if ctx.added:
            loss_grad = torch.where(loss_grad == 1.0, 1.0, torch.nan)
        saved = ctx.saved_tensors
        if loss_grad.device.type != "cpu" or loss_grad != 1.0:  # a CPU sees for nothing that nothing would change
            saved = [None if x is None else (x * loss_grad).to(x.dtype) for x in saved]
        return *saved, *[None] * 9


def _upstream(policy: Policy, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients [N] of the loss with respect to log-probabilities and entropies (None if it does not use them)."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logp, entropy) if x is not None]
        loss, _ = policy(leaves[0], leaves[1] if entropy is not None else None)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    g = torch.zeros_like(logp) if found[0] is None else found[0]
    return g, found[1] if entropy is not None else None
