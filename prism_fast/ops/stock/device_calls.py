"""The calls of shared-prefix attention on a GPU: one of each kind for a whole row, with offsets on the device.

Every segment with itself is plain attention over sequences of different lengths. The second kind needs the queries of
a prefix in adjacent rows: queries are copied into the order of their prefixes, keys and values never. Between two
prefixes the call has a sequence of keys without queries, so that it reads the prefixes in place. Nothing here waits for
the device, and shapes depend on shapes alone.

The kernels (``varlen``) leave rows outside of every sequence uninitialised, so no arithmetic may use their values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..prefix_layout import fitting, misfit
from ..reference.segments import sequence_of_token
from ..results import PrefixLayout
from .varlen import Kernel, Sequences, kernel_for


class Tokens(NamedTuple):
    """All tokens of the row, as a call's queries or keys. ``inside`` [T] bool: tokens that are no padding. ``outside``
    0-d: the result on padding, 0, or NaN if the layout does not fit the row; all tokens are then padding."""

    inside: Tensor
    outside: Tensor

    def read(self, x: Tensor) -> Tensor:
        return x

    def write(self, into: Tensor, x: Tensor) -> None:
        inside = self.inside.view(-1, *[1] * (x.dim() - 1))
        torch.where(inside, x, self.outside.to(x.dtype), out=into)


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
    """All branch tokens with their prefixes. ``slot`` [T] int64: the place of a token's query in the order of prefixes,
    T for one that sees no prefix; ``followed`` [T] bool: keys that some branch sees."""

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
        """[T, ...] to [T + 1, ...] by slot: the last row is for tokens that see no prefix; unused rows are 0."""
        return x.new_zeros((x.shape[0] + 1, *x.shape[1:])).index_copy_(0, self.slot, x)

    def _unsorted(self, x: Tensor, unseen: float) -> Tensor:
        x[-1] = unseen
        return x.index_select(0, self.slot)


class Calls(NamedTuple):
    own: list[OwnCall]
    joined: list[PrefixCall]
    outside: Tensor  # as in ``Tokens``


def device_calls(
    q: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    max_prefix: int,
    max_branch: int,
    max_queries: int | None = None,
) -> Calls:
    """The calls; none of a kind if a shape or bound says that it has no work.

    ``max_queries`` bounds the kernel's grid, which has as many blocks for every sequence as the longest one needs: with
    None, the length of the row, most blocks of a row with many prefixes would be idle.
    """
    tokens, segments = q.shape[0], branch_prefix.shape[0]
    layout = PrefixLayout(cu_branch, prefix_start, prefix_len, branch_prefix, max_prefix, max_branch, max_queries)
    bad = misfit(layout, tokens)
    outside = torch.where(bad, torch.nan, 0.0)
    if tokens == 0 or segments == 0 or max_branch == 0:
        return Calls([], [], outside)
    if max_queries is None:
        max_queries = tokens
    kernel = kernel_for(q, "shared_prefix_attention: backend='stock'", "backend='triton' or 'reference'")
    cu, prefix_start, prefix_len, branch_prefix = fitting(layout, bad)
    segment = sequence_of_token(cu, tokens)  # [T], S on padding
    everything = Tokens(segment < segments, outside)
    longest = min(max_branch, tokens)
    own = OwnCall(kernel, Sequences(cu, cu, longest, longest, True), everything, everything)
    prefixes = prefix_start.shape[0]
    if prefixes == 0 or max_prefix == 0 or max_queries == 0:
        return Calls([own], [], outside)
    # Prefixes in the order of their tokens; an empty one may start at the same token as another and must come first.
    place = (2 * prefix_start.long() + prefix_len).argsort()  # [P]
    rank = torch.empty_like(place).scatter_(0, place, torch.arange(prefixes, device=place.device))
    # Segments in the order of their prefixes; those without one, or with an empty one, come last.
    named = branch_prefix.clamp(min=0).long()
    key = torch.where((branch_prefix >= 0) & (prefix_len[named] > 0), rank[named], prefixes)  # [S]
    key, order = key.sort(stable=True)
    end = cu.diff().long()[order].cumsum(0)  # [S] past the last query of each, in that order
    first = torch.empty_like(end).scatter_(0, order, end - cu.diff()[order])
    seen = torch.searchsorted(key, torch.arange(prefixes, device=key.device), right=True)
    end = torch.cat((end.new_zeros(1), end))[seen]  # [P] past the last query of each prefix
    cu_queries = torch.stack((torch.cat((end.new_zeros(1), end[:-1])), end), 1)
    cu_keys = torch.stack((prefix_start, prefix_start + prefix_len), 1)[place]
    # Sequences 0, 2, … are the gaps between the prefixes and have no queries.
    cu_queries, cu_keys = (torch.cat((x.new_zeros(1), x.flatten())).int() for x in (cu_queries, cu_keys))
    sees = torch.cat((key.new_empty(segments).scatter_(0, order, key) < prefixes, key.new_zeros(1, dtype=torch.bool)))
    index = segment.clamp(max=segments - 1)
    position = torch.arange(tokens, device=q.device)
    slot = torch.where(sees[segment], first[index] + position - cu[index], tokens)
    has_queries = torch.cat((cu_queries.diff() > 0, sees[-1:]))  # [2 P + 1], False behind the last prefix
    followed = has_queries[sequence_of_token(cu_keys, tokens)]
    bound = Sequences(cu_queries, cu_keys, min(max_queries, tokens), min(max_prefix, tokens), False)
    return Calls([own], [PrefixCall(kernel, bound, everything, everything, slot, followed)], outside)
