"""Log-probabilities over a vocabulary whose rows are shared out among the ranks of a process group.

Rank r holds columns with the local softmax q_r, its maximum m_r, log-sum s_r and entropy H_r. With the mass
w_r = softmax over r of (m_r + s_r), exact relative to the largest maximum M,

    log p(target) = log q_r(target) + log w_r    on the rank that holds the target,
    entropy       = sum over r of w_r (H_r - log w_r),

so four numbers per row and rank are all that travels forward, gathered and joined in the order of the ranks: every rank
gets the same bits, in every run. Backward reads each local score as a part of the whole distribution; only
the gradient of the hidden states is a sum over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bad_values import counted
from .reference import softmax_rows
from .results import LogProb

if TYPE_CHECKING:
    from .reference.linear_logprob import Rows as ReferenceRows
    from .triton.head import Rows as TritonRows


class Whole(NamedTuple):
    """What all ranks together know of the rows. [N] each."""

    logp: Tensor  # NaN where no rank holds the target
    entropy: Tensor
    top: Tensor  # largest score
    log_sum: Tensor  # relative to it


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    make_rows: Callable[[Tensor], ReferenceRows | TritonRows],
    step: int,
    save: bool,
    entropy: bool,
    ignore_index: int,
    weight_grad_out: Tensor | None,
    group: dist.ProcessGroup,
) -> LogProb:
    """See ``vocab_group`` of ``prism_fast.ops.linear_logprob``.

    ``make_rows``: the head's shard, given targets [N] among its own columns (-1: another rank's). ``step``: rows at a
    time. Every rank of ``group`` calls this, forward and backward, with the same rows.
    """
    return LogProb(
        *_VocabParallel.apply(
            hidden, weight, bias, target, make_rows, step, save, entropy, ignore_index, weight_grad_out, group
        )
    )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, target, make_rows, step, save, entropy, ignore_index, weight_grad_out, group
    ):
        n = hidden.shape[0]
        first, total = _place(weight, group)
        ignored = target == ignore_index
        outside = counted(((target < 0) | (target >= total)) & ~ignored)
        own = target.long() - first
        mine = (own >= 0) & (own < weight.shape[0]) & ~ignored
        own = torch.where(mine, own, -1)
        head = make_rows(own)
        blocks = [slice(at, min(n, at + step)) for at in range(0, n, step)]
        kept = [head.forward(block, save) for block in blocks]
        here = [_statistics(found, entropy) for found in kept]
        local = torch.cat(here, 1) if here else hidden.new_empty((4, 0), dtype=_wide(hidden))  # [4, N]
        whole = join(_gathered(torch.where(mine, local[0], -math.inf), local, group))
        ctx.save_for_backward(hidden, weight, bias, ignored, outside, *whole)
        # A head that has no use for what it kept is made anew, so that its working memory does not outlive the forward.
        ctx.make_head = (lambda: head) if save else lambda: make_rows(own)
        ctx.blocks, ctx.kept = blocks, kept if save else None
        ctx.entropy, ctx.weight_grad_out, ctx.group = entropy, weight_grad_out, group
        ctx.set_materialize_grads(False)
        logp, spread = softmax_rows.finish(whole.logp, whole.entropy, ignored, outside)
        return logp, spread if entropy else logp.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, logp_grad, entropy_grad):
        hidden, _, _, ignored, outside, *whole = ctx.saved_tensors  # checks that nobody has changed the operands
        whole, wants = Whole(*whole), ctx.needs_input_grad[:3]
        if ctx.make_head is None:
            raise RuntimeError("linear_logprob: what was kept is used up; pass save='recompute' to go backward twice")
        g = softmax_rows.upstream(logp_grad, whole.logp, ignored)
        g = torch.where(outside & (g != 0.0), math.nan, g).contiguous()
        h = None
        if ctx.entropy and entropy_grad is not None:
            h = softmax_rows.upstream(entropy_grad, whole.logp, ignored).contiguous()
        head = ctx.make_head()
        head.prepare(wants, ctx.weight_grad_out)
        for number, block in enumerate(ctx.blocks):
            found = head.forward(block, True) if ctx.kept is None else ctx.kept[number]
            top = _row(found, "row_max", "top")
            # The local scores are relative to the local maximum: so must be the logarithm of the whole sum.
            found = found._replace(
                log_sum=whole.log_sum[block] + (whole.top[block] - top),
                logp=whole.logp[block],
                entropy=whole.entropy[block],
            )
            head.backward(block, found, g[block], None if h is None else h[block])
        if ctx.kept is not None:
            ctx.make_head = ctx.kept = None
        of_hidden, of_weight, of_bias = head.gradients(ctx.weight_grad_out is None)
        if of_hidden is not None:
            # In float32: the ranks' parts are larger than their sum, and would each be rounded.
            dist.all_reduce(wide := of_hidden.to(_wide(hidden)), group=ctx.group)
            of_hidden = wide.to(hidden.dtype)
        return of_hidden, of_weight, of_bias, *[None] * 8


def _place(weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(number of the shard's first row in the whole matrix, rows of the whole matrix), on the device."""
    size = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    ends = torch.cat(sizes).cumsum(0)
    return ends[dist.get_rank(group)] - size[0], ends[-1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row(found, *names: str) -> Tensor:
    """[n] the row maximum, as the backends call it."""
    return next(getattr(found, name) for name in names if hasattr(found, name)).reshape(-1)


def _statistics(found, entropy: bool) -> Tensor:
    """[4, n] log-probability of the target among these columns, entropy, maximum, log-sum."""
    top = _row(found, "row_max", "top")
    return torch.stack((found.logp, found.entropy if entropy else torch.zeros_like(top), top, found.log_sum))


def _gathered(logp: Tensor, local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, 4, N] with log-probabilities that are -inf except on the rank of the target."""
    mine = torch.cat((logp[None], local[1:])).contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)


def join(parts: Tensor) -> Whole:
    """Statistics of shards [ranks, 4, N] -> those of the whole vocabulary, added up in the order of the ranks."""
    logp, entropy, top, log_sum = parts.unbind(1)  # [ranks, N]
    highest = top.amax(0)
    exponent = (top - highest) + log_sum
    mass = exponent.exp()
    total = mass.sum(0)
    whole_sum = total.log()
    log_share = exponent - whole_sum
    share = mass / total
    held = torch.where(share > 0.0, share * (entropy - log_share), 0.0)
    # A rank without the target says -inf, so the maximum picks the one that has it; none at all is NaN.
    found = torch.where(logp == -math.inf, -math.inf, logp + log_share)
    logp = torch.where((logp == -math.inf).all(0), math.nan, found.amax(0))
    return Whole(logp, held.sum(0), highest, whole_sum)
