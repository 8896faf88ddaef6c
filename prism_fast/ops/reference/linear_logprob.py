"""Token log-probabilities from hidden states, in blocks of rows, so that memory holds [N, V] at most once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..bad_values import counted
from ..forms import TwoForms, saved_once
from ..results import LogProb
from . import softmax_rows as rows

# Scores of one block. Blocks need many rows, because each reads the weight and reads and writes its gradient: blocks of
# 256 rows take 5 % longer than all rows at once, blocks of 128 rows 25 %. Fresh memory costs time, reused memory none.
BLOCK_BYTES = {"cpu": 64 << 20}
BLOCK_BYTES_ELSEWHERE = 256 << 20
MIN_BLOCK_ROWS = 256


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
    temperature = rows.temperature_rows(temperature, hidden.shape[0], hidden.new_empty(0, dtype=_computed(hidden)))
    arguments = (hidden, weight, bias, target, temperature, weight_grad_out, softcap, entropy, ignore_index, save)
    return LogProb(*_forms(*arguments)[:2])


def block_rows(vocabulary: int, like: Tensor) -> int:
    """Rows per block."""
    room = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES_ELSEWHERE)
    return max(MIN_BLOCK_ROWS, room // (vocabulary * like.element_size()))


class Found(NamedTuple):
    """Statistics of a block of n rows, for backward too."""

    logp: Tensor  # [n] of the target's column
    entropy: Tensor  # [n], or [0] where the entropy is not computed
    log_sum: Tensor  # [n] relative to the maximum
    top: Tensor  # [n, 1], and own [n]: as in `softmax_rows.exponentials_`
    own: Tensor
    room: Tensor | None  # [at least n, V]: its first n rows are exp(scores minus maximum), if kept


class Rows:
    """Operands of a head and the gradients collected so far. ``ops.triton.head.Rows`` does the same by kernels.

    hidden [N, H], weight [V, H], bias [V] or None, target [N] int64, each a valid column, temperature [N, 1].
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
        entropy: bool,
    ):
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.hidden, self.weight, self.bias = _lifted(hidden, weight, bias)
        self.target, self.temperature = target, temperature.to(self.hidden.dtype)
        self.softcap, self.entropy = softcap, entropy
        self.ban = None  # [V] 0 or -inf, added after the cap, which makes a banned token's -inf finite
        if bias is not None and softcap is not None:
            self.ban = torch.where(self.bias == -math.inf, self.bias, 0.0)
        self.room: Tensor | None = None  # [rows, V] memory of an earlier block's scores, to be reused
        self.spare: Tensor | None = None  # [chunk, V]

    def forward(self, block: slice, keep: bool) -> Found:
        """Statistics of the rows ``block``; with ``keep`` also the exponentials of their scores."""
        room, statistics = self._exponentials(block, self.entropy)
        if not keep:
            self.room = room
        return Found(*statistics, room if keep else None)

    def _exponentials(self, block: slice, entropy: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(exponentials of the scores, (logp, entropy, log-sum, top, own)), as in `Found`."""
        x, temperature, column = self.hidden[block], self.temperature[block], self.target[block]
        room, self.room = self.room, None
        if room is None or room.shape[0] < x.shape[0]:
            room = x.new_empty(x.shape[0], self.weight.shape[0])
        z = _product(x, self.weight, self.bias, room[: x.shape[0]])
        logp, log_sum, top = z.new_empty(len(z)), z.new_empty(len(z)), z.new_empty(len(z), 1)
        entropies, own = z.new_empty(len(z) if entropy else 0), z.new_empty(len(z))
        for part in self._chunks(z):
            spare = self._spare(z[part]) if entropy else None
            logp[part], log_sum[part], found, top[part], own[part] = rows.exponentials_(
                z[part], column[part], temperature[part], self.softcap, entropy, spare, self.ban
            )
            if entropy:
                entropies[part] = found
        return room, (logp, entropies, log_sum, top, own)

    def _chunks(self, z: Tensor) -> Iterator[slice]:
        step = rows.chunk_rows(z.shape[1], z)
        yield from (slice(at, min(z.shape[0], at + step)) for at in range(0, z.shape[0], step))

    def _spare(self, chunk: Tensor) -> Tensor:
        """Memory of the size of the chunk."""
        if self.spare is None or self.spare.shape[0] < chunk.shape[0]:
            self.spare = torch.empty_like(chunk)
        return self.spare[: chunk.shape[0]]

    def prepare(self, wants: tuple[bool, bool, bool], weight_grad: Tensor | None) -> None:
        """Set up the gradients of hidden, weight and bias that `backward` fills; ``weight_grad`` is added to."""
        self.wants = wants
        self.hidden_grad = torch.empty_like(self.hidden) if wants[0] else None
        self.weight_grad = weight_grad if wants[1] else None
        self.bias_grad = torch.zeros_like(self.bias) if wants[2] else None

    def log_sum_exp(self, block: slice, found: Found) -> Tensor:
        """[n] of the capped scores divided by the temperature."""
        top = found.top if self.softcap is None else found.top * (self.softcap / self.temperature[block])
        return top[:, 0] + found.log_sum

    def backward(
        self,
        block: slice,
        found: Found,
        g: Tensor,
        h: Tensor | None = None,
        apart: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add the gradients of the rows ``block``. Overwrites ``found.room``; computes it again if it was not kept.

        g, h [n]: upstream gradients of log-probability and entropy (None: no entropy). apart: as in
        `softmax_rows.gradient_`.
        """
        x, temperature, column = self.hidden[block], self.temperature[block], self.target[block]
        room = self._exponentials(block, entropy=False)[0] if found.room is None else found.room
        m = room[: len(x)]  # [n, V]
        factor = torch.empty_like(temperature)  # [n, 1]; the gradient of the scores is factor * m
        for part in self._chunks(m):
            factor[part] = rows.gradient_(
                m[part], column[part], found.own[part], found.log_sum[part], g[part], None if h is None else h[part],
                found.entropy[part], temperature[part], self.softcap, found.top[part],
                None if h is None and self.softcap is None else self._spare(m[part]),
                None if apart is None else (apart[0][part], apart[1][part]),
            )  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):  # these products stay in float32
            if self.wants[0]:
                torch.mm(m, self.weight, out=self.hidden_grad[block]).mul_(factor)
            if self.wants[1]:
                # A row without upstream gradient must add nothing, even where its hidden state is not finite.
                active = rows.active(g, h, apart)
                scaled = torch.where(active[:, None], factor * x, 0.0)
                if self.weight_grad is None:
                    self.weight_grad = torch.mm(m.t(), scaled)
                else:
                    kind = self.weight_grad.dtype
                    self.weight_grad.addmm_(m.t().to(kind), scaled.to(kind))
            if self.wants[2]:
                self.bias_grad.addmv_(m.t(), factor[:, 0])
        self.room = room

    def gradients(self, with_weight: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight (None without ``with_weight``) and bias, in their dtypes; None if not wanted."""
        if self.wants[1] and self.weight_grad is None:  # there were no rows
            self.weight_grad = torch.zeros_like(self.weight)
        found = (self.hidden_grad, self.weight_grad if with_weight else None, self.bias_grad)
        return tuple(None if x is None else x.to(kind) for x, kind in zip(found, self.dtypes, strict=True))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy [N] or [0], log-sum, top [N, 1], own, exponentials [N, V] or [0] if not saved).

    temperature [N, 1]. Some arguments are for backward alone.
    """
    n, vocabulary = hidden.shape[0], weight.shape[0]
    column, ignored, outside = rows.target_rows(target, vocabulary, ignore_index)
    head = Rows(hidden, weight, bias, column, temperature, softcap, entropy)
    logp, entropies, log_sum, top, own, kept = _allocate(head.hidden, vocabulary, entropy, save)
    for block in _blocks(n, vocabulary, head.hidden):
        if save:
            head.room = kept[block]
        found = head.forward(block, save)
        logp[block], log_sum[block], top[block], own[block] = found.logp, found.log_sum, found.top, found.own
        if entropy:
            entropies[block] = found.entropy
    return *rows.finish(logp, entropies, ignored, counted(outside)), log_sum, top, own, kept


def _allocate(like: Tensor, vocabulary: int, entropy: bool, save: bool) -> tuple[Tensor, ...]:
    n = like.shape[0]
    sizes = ((n,), (n if entropy else 0,), (n,), (n, 1), (n,), (n, vocabulary) if save else (0,))
    return tuple(like.new_empty(size) for size in sizes)


def _blocks(n: int, vocabulary: int, like: Tensor) -> list[slice]:
    step = block_rows(vocabulary, like)
    return [slice(at, min(n, at + step)) for at in range(0, n, step)]


def _run_backward(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    entropies: Tensor,
    log_sum: Tensor,
    top: Tensor,
    own: Tensor,
    kept: Tensor | None,
    weight_grad_out: Tensor | None,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, [0] where not wanted. Overwrites ``kept``; adds to ``weight_grad_out``."""
    vocabulary = weight.shape[0]
    column, ignored, outside = rows.target_rows(target, vocabulary, ignore_index)
    head = Rows(hidden, weight, bias, column, temperature, softcap, entropy)
    g = rows.upstream(logp_grad, log_sum, ignored)
    g = torch.where(outside & (g != 0.0), math.nan, g)
    h = rows.upstream(entropy_grad, log_sum, ignored) if entropy and entropy_grad is not None else None
    head.prepare((want_hidden, want_weight, want_bias), weight_grad_out)
    for block in _blocks(hidden.shape[0], vocabulary, head.hidden):
        room = None if kept is None else kept[block]
        of_block = entropies[block] if entropy else entropies
        # Backward does not read the log-probabilities: the log-sums fill their place.
        found = Found(log_sum[block], of_block, log_sum[block], top[block], own[block], room)
        head.backward(block, found, g[block], None if h is None else h[block])
    return tuple(hidden.new_empty(0) if x is None else x for x in head.gradients(weight_grad_out is None))


_backward_operator = torch.library.custom_op(
    "prism_fast::linear_logprob_reference_backward", _run_backward, mutates_args=("kept", "weight_grad_out")
)


@_backward_operator.register_fake
def _(logp_grad, entropy_grad, hidden, weight, bias, *rest):
    weight_grad_out, (want_hidden, want_weight, want_bias) = rest[7], rest[-3:]
    return (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight and weight_grad_out is None else hidden.new_empty(0),
        torch.empty_like(bias) if want_bias else hidden.new_empty(0),
    )


def _fake(hidden, weight, bias, target, temperature, weight_grad_out, softcap, entropy, ignore_index, save):
    like = hidden.new_empty(hidden.shape, dtype=_computed(hidden))
    return _allocate(like, weight.shape[0], entropy, save)


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, target, temperature, weight_grad_out, softcap, entropy, ignore_index, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, target, temperature, *output[1:])
    # Not through save_for_backward, which forbids the writes to it between forward and backward.
    ctx.weight_grad_out, ctx.options = weight_grad_out, (softcap, entropy, ignore_index)


def _gradients(ctx, traced: bool, logp_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    wants, into = ctx.needs_input_grad[:3], ctx.weight_grad_out
    *saved, kept = saved_once(ctx, "linear_logprob", "pass save='recompute' to call it again")
    arguments = (logp_grad, entropy_grad, *saved, kept if kept.dim() == 2 else None, into, *ctx.options, *wants)
    found = (_backward_operator if traced else _run_backward)(*arguments)
    given = (wants[0], wants[1] and into is None, wants[2])
    return tuple(x if there else None for x, there in zip(found, given, strict=True))


_forms = TwoForms(
    "prism_fast::linear_logprob_reference",
    _run,
    backend="reference",
    fake=_fake,
    leading=3,
    results=2,
    save=_save,
    gradients=_gradients,
)


def _computed(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lifted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in float32 (float64 for float64), where products of half-precision numbers are exact."""
    kind = _computed(hidden)
    return hidden.to(kind), weight.to(hidden.dtype).to(kind), None if bias is None else bias.to(kind)


def _product(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """x [n, H] @ w [V, H].T + b into out [n, V], in float32 or wider also inside an autocast region."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)
