"""The mathematics of one block of rows: log-probability and entropy from scores, and the gradient of both.

Scores are kept relative to their row maximum, so that maximum and log-sum are never added into one rounded number. The
caller passes the memory for intermediate results as large as the scores: fresh memory costs a CPU more time than the
arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_PROBABILITY_FLOOR = -1e4
# Scores of one chunk. On a CPU the cache should still hold the results of one pass when the next one reads them.
CHUNK_BYTES = {"cpu": 8 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20


def chunk_rows(vocabulary: int, like: Tensor) -> int:
    """Rows per chunk, at least one."""
    room = CHUNK_BYTES.get(like.device.type, CHUNK_BYTES_ELSEWHERE)
    return max(1, room // (vocabulary * like.element_size()))


def temperature_rows(temperature: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """[N, 1] temperature of each row, in the dtype of the computation."""
    if not isinstance(temperature, Tensor):
        return torch.full((rows, 1), float(temperature), dtype=like.dtype, device=like.device)
    return temperature.detach().to(like.dtype).expand(rows)[:, None]


def target_rows(target: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(column [N] int64 that is safe to gather, ignored [N], outside the vocabulary [N]) of targets."""
    ignored = target == ignore_index
    outside = ((target < 0) | (target >= vocabulary)) & ~ignored
    return torch.where(ignored | outside, 0, target.long()), ignored, outside


def exponentials_(
    z: Tensor,
    column: Tensor,
    temperature: Tensor,
    softcap: float | None,
    entropy: bool,
    spare: Tensor | None = None,
    ban: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In place: raw scores z [n, V] -> exponentials e of z' = cap(z) / temperature minus the row maximum.

    Returns (logp [n], log-sum [n], entropy [n] or empty, top [n, 1], own [n]):
    log p_t = z'_t - max z' - log sum e and H = log sum e - sum e (z' - max z') / sum e. top and own are the row maximum
    and the target's value: of tanh(z / softcap) with a soft cap, of z' without. With ``entropy``, ``spare`` [n, V] is
    overwritten. ``ban`` [V], 0 or -inf, is added after the cap, which makes a banned token's -inf finite.
    """
    if softcap is not None:
        z.div_(softcap).tanh_()
        if ban is not None:
            z.add_(ban)
    else:
        z.div_(temperature)
    top = z.amax(-1, keepdim=True)
    own = z.gather(-1, column[:, None])
    z.sub_(top)
    # A raw score of -inf (a banned token) counts as the lowest number: its probability is 0, and 0 * z' stays 0.
    lowest = torch.finfo(z.dtype).min
    at_target = own - top
    if softcap is not None:
        z.mul_(softcap / temperature)
        at_target.mul_(softcap / temperature)
    at_target = at_target[:, 0].clamp(min=lowest)
    if entropy:
        spare = torch.clamp(z, min=lowest, out=spare)
    total = z.exp_().sum(-1)
    log_sum = total.log()
    held = log_sum - spare.mul_(z).sum(-1) / total if entropy else z.new_empty(0)
    return at_target - log_sum, log_sum, held, top, own[:, 0]


def gradient_(
    e: Tensor,
    column: Tensor,
    own: Tensor,
    log_sum: Tensor,
    logp_grad: Tensor,
    entropy_grad: Tensor | None,
    entropy: Tensor,
    temperature: Tensor,
    softcap: float | None,
    top: Tensor,
    spare: Tensor | None = None,
    apart: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """In place: exponentials e [n, V] -> m [n, V]; returns factor [n, 1]. The gradient of the raw scores is factor * m.

    With z', ``top`` and ``own`` as in `exponentials_`, d logp / dz'_j = [j = target] - p_j and
    dH / dz'_j = -p_j (log p_j + H). A factor of the whole row stays outside of m, because the caller can apply it to a
    narrower operand. Rows whose upstream gradients are exactly 0 give exact zeros, whatever they hold. ``spare``
    [n, V] is overwritten where the entropy has a gradient or the scores are capped. ``apart``: (q, s) [n] each, instead
    of the entropy's gradient, for losses of more than the log-probability: the gradient of z'_j is then
    logp_grad·[j = target] - q·p_j + s.
    """
    idle = ~active(logp_grad, entropy_grad, apart)
    g, at = logp_grad[:, None], column[:, None]
    slope = None
    if softcap is not None:
        # The slope of tanh, 1 - y², from y = top + log e · temperature / softcap. Where e is 0 the score is lost, but
        # its gradient is 0 too; only the target's does not vanish with its probability, so its y comes from ``own``.
        capped = torch.log(e, out=spare).mul_(temperature / softcap).add_(top)
        capped.scatter_(-1, at, own[:, None]).clamp_(-1.0, 1.0)
        slope = 1.0 - capped.square_()
    e.mul_(torch.exp(-log_sum)[:, None])  # p
    if apart is not None:
        q, every = apart
        e.mul_(q[:, None]).sub_(every[:, None])
        factor, at_target = torch.full_like(g, -1.0), -g
    elif entropy_grad is None:
        factor, at_target = -g, torch.full_like(g, -1.0)
    else:
        # A probability is 0 long before the floor; without the floor, a banned token would give 0 times infinity.
        coefficient = torch.log(e, out=spare).clamp_(min=LOG_PROBABILITY_FLOOR)
        e.mul_(coefficient.add_(entropy[:, None]).mul_(entropy_grad[:, None]).add_(g))
        factor, at_target = torch.full_like(g, -1.0), -g
    e.scatter_add_(-1, at, at_target)
    if slope is not None:
        e.mul_(slope)
    clear_rows_(e, idle)
    return torch.where(idle[:, None], 0.0, factor / temperature)


def active(g: Tensor, h: Tensor | None, apart: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[n] bool: rows with an upstream gradient."""
    found = g != 0.0
    for other in (h, *(apart or ())):
        if other is not None:
            found = found | (other != 0.0)
    return found


def clear_rows_(x: Tensor, which: Tensor) -> None:
    """In place: the rows ``which`` [n] bool of x [n, V] become 0."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        x.index_fill_(0, which.nonzero()[:, 0], 0.0)  # a CPU reads ``which`` cheaply and writes only these rows
    else:
        x.masked_fill_(which[:, None], 0.0)


def finish(logp: Tensor, entropy: Tensor, ignored: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy): 0 on ignored rows; logp NaN at targets outside the vocabulary. ``entropy`` may be empty."""
    logp = torch.where(outside, math.nan, logp).masked_fill(ignored, 0.0)
    return logp, entropy.masked_fill(ignored, 0.0) if entropy.shape == logp.shape else entropy


def upstream(gradient: Tensor | None, logp: Tensor, ignored: Tensor) -> Tensor:
    """[N] upstream gradient of a result, in the dtype of ``logp``; 0 on ignored rows, and everywhere for None."""
    if gradient is None:
        return torch.zeros_like(logp)
    return gradient.to(logp.dtype).masked_fill(ignored, 0.0)
