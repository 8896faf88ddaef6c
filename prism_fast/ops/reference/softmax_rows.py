"""The mathematics of one block of rows: log-probability and entropy from scores, and the gradient of both.

Scores are kept relative to their row maximum, so that maximum and log-sum are never added into one rounded number.
Intermediate results as large as the scores go where the caller says: fresh memory costs a CPU more than the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_PROBABILITY_FLOOR = -1e4
# Scores that are gone over together: on a CPU what one pass has written should still be in the cache for the next.
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
    log p_t = z'_t - max z' - log sum e and H = log sum e - sum e z' / sum e. top and own are the maximum and the
    target's of y = tanh(z / softcap) with a soft cap, of z' without. With ``entropy``, ``spare`` [n, V] is written
    over. ``ban`` [V], 0 or -inf, is added after the cap, which would lift a banned token's -inf.
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
    dH / dz'_j = -p_j (log p_j + H). What belongs to a whole row stays outside of m, because the caller can multiply its
    narrow operand with it. Rows whose upstream gradients are exactly 0 come out as exact zeros whatever they hold.
    ``spare`` [n, V] is written over where the entropy has a gradient or the scores are capped. ``apart``: (q, s) [n]
    each, instead of the entropy's gradient, for losses of more than the log-probability: the gradient of z'_j is then
    logp_grad·[j = target] - q·p_j + s.
    """
    idle = ~active(logp_grad, entropy_grad, apart)
    g, at = logp_grad[:, None], column[:, None]
    slope = None
    if softcap is not None:
        # Of tanh, from y = top + log e · temperature / softcap. Where e is 0 the score is lost and nothing is left to
        # multiply, but at the target, whose gradient does not vanish with its probability.
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
        # Probabilities are 0 long before the floor; without it a banned token's 0 would meet an infinite coefficient.
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
        x.index_fill_(0, which.nonzero()[:, 0], 0.0)  # a CPU can look which they are instead of going over all
    else:
        x.masked_fill_(which[:, None], 0.0)


def finish(logp: Tensor, entropy: Tensor, ignored: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Ignored rows give 0, targets outside the vocabulary give NaN. ``entropy`` may be empty."""
    logp = torch.where(outside, math.nan, logp).masked_fill(ignored, 0.0)
    return logp, entropy.masked_fill(ignored, 0.0) if entropy.shape == logp.shape else entropy


def upstream(gradient: Tensor | None, logp: Tensor, ignored: Tensor) -> Tensor:
    """[N] upstream gradient of a result in the dtype of the computation; none and ignored rows count as 0."""
    if gradient is None:
        return torch.zeros_like(logp)
    return gradient.to(logp.dtype).masked_fill(ignored, 0.0)
