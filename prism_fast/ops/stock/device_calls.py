"""The calls of shared-prefix attention on a GPU: one of each kind for a whole row, offsets on the device.

Every segment with itself is plain attention over sequences of any length. For the second kind, too, the queries of a
prefix must lie one behind the other: their rows are copied into the order of the prefixes (queries, never keys or
values). Between two prefixes stands a sequence of keys without queries, so that the prefixes are read where they lie.
Nothing here asks the host, and shapes depend on shapes alone.

The kernels are PyTorch's: FlashAttention for half precision (whichever version is activated by
``torch.nn.attention.activate_flash_attention_impl``), the memory-efficient one for float32 and for older cards. Rows
outside of every sequence come back unwritten from both, so no value of theirs is ever used in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.segments import sequence_of_token

_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_efficient_forward = torch.ops.aten._efficient_attention_forward
_efficient_backward = torch.ops.aten._efficient_attention_backward
MAX_FLASH_WIDTH = 256
CAUSAL = {False: 0, True: 1}  # mask types of the memory-efficient kernel


class Sequences(NamedTuple):
    """Which rows of queries attend to which rows of keys. Offsets int32 [B + 1]; the lengths bound those of sequences
    that have queries."""

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool


class Kernel(NamedTuple):
    """``forward(q, k, v, sequences, scale)``: out [N, Hq, D] and log-sum-exp [N, Hq] float32;
    ``backward(grad, q, k, v, out, lse, sequences, scale)``: dq, dk, dv. q [N, Hq, D], k and v [M, Hk, D]."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Tokens(NamedTuple):
    """All tokens of the row, as a call's queries or keys; ``inside`` [T] bool says which are no padding."""

    inside: Tensor

    def read(self, x: Tensor) -> Tensor:
        return x

    def write(self, into: Tensor, x: Tensor) -> None:
        inside = self.inside.view(-1, *[1] * (x.dim() - 1))
        torch.where(inside, x, x.new_zeros(()), out=into)


class OwnCall(NamedTuple):
    """Every segment with itself."""

    kernel: Kernel
    sequences: Sequences
    queries: Tokens
    keys: Tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(q, k, v, self.sequences, scale)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernel.backward(grad, q, k, v, out, total, self.sequences, scale)


class PrefixCall(NamedTuple):
    """All branch tokens with their prefixes. ``slot`` [T] int64: where a token's query stands in the prefixes' order, T
    for one that sees no prefix; ``followed`` [T] bool: keys that some branch sees."""

    kernel: Kernel
    sequences: Sequences
    queries: Tokens
    keys: Tokens
    slot: Tensor
    followed: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        part, lse = self.kernel.forward(self._sorted(q), k, v, self.sequences, scale)
        return self._unsorted(part, 0.0), self._unsorted(lse, -torch.inf)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, out, total = (self._sorted(x) for x in (grad, q, out, total))
        dq, dk, dv = self.kernel.backward(grad, q, k, v, out, total, self.sequences, scale)
        unseen = ~self.followed[:, None, None]
        return self._unsorted(dq, 0.0), dk.masked_fill_(unseen, 0.0), dv.masked_fill_(unseen, 0.0)

    def _sorted(self, x: Tensor) -> Tensor:
        """[T, ...] to [T + 1, ...]: the last row takes whatever sees no prefix, rows nobody stands in are 0."""
        return x.new_zeros((x.shape[0] + 1, *x.shape[1:])).index_copy_(0, self.slot, x)

    def _unsorted(self, x: Tensor, unseen: float) -> Tensor:
        x[-1] = unseen
        return x.index_select(0, self.slot)


def device_calls(
    q: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    max_prefix: int,
    max_branch: int,
    max_queries: int | None = None,
) -> tuple[list[OwnCall], list[PrefixCall]]:
    """None of either kind where a shape or bound says that there is nothing to do.

    ``max_queries`` bounds the kernel's grid, which is cut for the longest sequence of queries and is empty elsewhere:
    with the length of the row (None) nearly all blocks of a row with many prefixes would have nothing to do.
    """
    tokens, segments = q.shape[0], branch_prefix.shape[0]
    if tokens == 0 or segments == 0 or max_branch == 0:
        return [], []
    if max_queries is None:
        max_queries = tokens
    kernel = kernel_for(q)
    cu, prefix_start, prefix_len, branch_prefix = (
        x.contiguous() for x in (cu_branch, prefix_start, prefix_len, branch_prefix)
    )
    segment = sequence_of_token(cu, tokens)  # [T], S on padding
    everything = Tokens(segment < segments)
    longest = min(max_branch, tokens)
    own = OwnCall(kernel, Sequences(cu, cu, longest, longest, True), everything, everything)
    prefixes = prefix_start.shape[0]
    if prefixes == 0 or max_prefix == 0 or max_queries == 0:
        return [own], []
    # Prefixes as they lie; an empty one may start where another does, and must come before it.
    place = (2 * prefix_start.long() + prefix_len).argsort()  # [P]
    rank = torch.empty_like(place).scatter_(0, place, torch.arange(prefixes, device=place.device))
    # Segments in the order of their prefixes, those without one (or with an empty one) behind them all.
    named = branch_prefix.clamp(min=0).long()
    key = torch.where((branch_prefix >= 0) & (prefix_len[named] > 0), rank[named], prefixes)  # [S]
    key, order = key.sort(stable=True)
    end = cu.diff().long()[order].cumsum(0)  # [S] past the last query of each, in that order
    first = torch.empty_like(end).scatter_(0, order, end - cu.diff()[order])
    seen = torch.searchsorted(key, torch.arange(prefixes, device=key.device), right=True)
    end = torch.cat((end.new_zeros(1), end))[seen]  # [P] past the last query of each prefix
    cu_queries = torch.stack((torch.cat((end.new_zeros(1), end[:-1])), end), 1)
    cu_keys = torch.stack((prefix_start, prefix_start + prefix_len), 1)[place]
    # Sequences 0, 2, … lie between the prefixes and have no queries.
    cu_queries, cu_keys = (torch.cat((x.new_zeros(1), x.flatten())).int() for x in (cu_queries, cu_keys))
    sees = torch.cat((key.new_empty(segments).scatter_(0, order, key) < prefixes, key.new_zeros(1, dtype=torch.bool)))
    index = segment.clamp(max=segments - 1)
    position = torch.arange(tokens, device=q.device)
    slot = torch.where(sees[segment], first[index] + position - cu[index], tokens)
    has_queries = torch.cat((cu_queries.diff() > 0, sees[-1:]))  # [2 P + 1], False behind the last prefix
    followed = has_queries[sequence_of_token(cu_keys, tokens)]
    bound = Sequences(cu_queries, cu_keys, min(max_queries, tokens), min(max_prefix, tokens), False)
    return [own], [PrefixCall(kernel, bound, everything, everything, slot, followed)]


def kernel_for(q: Tensor) -> Kernel:
    """The kernel that takes tensors like ``q`` [T, Hq, D]. Raises NotImplementedError where there is none."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise NotImplementedError(
            f"shared_prefix_attention: backend='stock' on CUDA takes bfloat16, float16 or float32, got {q.dtype}; "
            "use backend='reference'"
        )
    if q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0):
        return Kernel(efficient_forward, efficient_backward)
    if q.shape[2] % 8 or q.shape[2] > MAX_FLASH_WIDTH:
        raise NotImplementedError(
            f"shared_prefix_attention: backend='stock' on CUDA takes half-precision heads of a multiple of 8 up to "
            f"{MAX_FLASH_WIDTH}, got {q.shape[2]}; use backend='triton' or 'reference'"
        )
    return Kernel(flash_forward, flash_backward)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    # With a bound of 1 the kernel takes every sequence for one query and reshapes: empty sequences would be misread.
    longest = max(2, s.max_queries)
    out, lse, *_ = _flash_forward(
        q, k, v, s.cu_queries, s.cu_keys, longest, s.max_keys, 0.0, s.causal, False, scale=scale
    )
    return out, lse.t()  # [Hq, N]


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Two numbers of the dropout's generator, which the kernel reads even without dropout.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return _flash_backward(
        grad, q, k, v, out, lse.t().contiguous(), s.cu_queries, s.cu_keys, max(2, s.max_queries), s.max_keys,
        0.0, s.causal, state, unused, scale=scale,
    )  # fmt: skip


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel knows no grouped heads: one call for each member of the groups, all on the same keys."""
    sequence, position = _places(s, q.shape[0])
    parts, sums = [], []
    for member in _members(q, k):
        out, lse, *_ = _efficient_forward(
            member, k[None], v[None], None, s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, 0.0,
            CAUSAL[s.causal], True, scale=scale,
        )  # fmt: skip
        parts.append(out[0])
        sums.append(lse[sequence.clamp(max=lse.shape[0] - 1), :, position])  # [B, Hk, length] to [N, Hk]
    return torch.stack(parts, 2).flatten(1, 2), torch.stack(sums, 2).flatten(1, 2)


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    sequence, position = _places(s, q.shape[0])
    count, length = s.cu_queries.shape[0] - 1, -(-s.max_queries // 32) * 32
    dq, dk, dv = [], [], []
    generator = torch.zeros((), dtype=torch.long, device=q.device)
    for member, upstream, joint, sums in zip(*(_members(x, k) for x in (q, grad, out, lse[..., None])), strict=True):
        # Padding has an infinite sum, which makes its probabilities 0; the last sequence takes rows outside of all.
        padded = lse.new_full((count + 1, k.shape[1], length), torch.inf)
        padded[sequence, :, position] = sums[0, :, :, 0]
        parts = _efficient_backward(
            upstream, member, k[None], v[None], None, joint.contiguous(), s.cu_queries, s.cu_keys, s.max_queries,
            s.max_keys, padded[:count], 0.0, generator, generator, CAUSAL[s.causal], False, scale=scale,
        )  # fmt: skip
        for into, part in zip((dq, dk, dv), parts, strict=False):
            into.append(part[0])
    return torch.stack(dq, 2).flatten(1, 2), sum(dk), sum(dv)


def _members(x: Tensor, k: Tensor) -> list[Tensor]:
    """[N, Hq, D] as one view [1, N, Hk, D] for each place in a group of query heads."""
    return list(x.unflatten(1, (k.shape[1], -1))[None].unbind(3))


def _places(s: Sequences, rows: int) -> tuple[Tensor, Tensor]:
    """([N], [N]) int64: the sequence of each row of queries (their number outside of all) and its place therein."""
    sequence = sequence_of_token(s.cu_queries, rows)
    place = torch.arange(rows, device=sequence.device) - s.cu_queries[sequence.clamp(max=s.cu_queries.shape[0] - 2)]
    return sequence, torch.where(sequence < s.cu_queries.shape[0] - 1, place, 0)
