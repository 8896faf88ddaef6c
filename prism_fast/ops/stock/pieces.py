"""Groups segments of different lengths into few calls of a batched attention kernel, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# A padded batch may compute at most so many tokens per real one. Below that, another call (some tens of microseconds in
# forward and in backward) costs more than the padding.
PADDING = 1.25


class Rows(NamedTuple):
    """Tokens of one call: ``batch`` equally long rows of ``length`` tokens.

    ``start >= 0``: the tokens are adjacent from token ``start`` on, and read as a view. Otherwise ``gather`` ``[batch ·
    length]`` int64 are the tokens (the last one of a short segment repeated to the full length) and ``real`` int64 the
    slots that repeat none.
    """

    batch: int
    length: int
    start: int
    gather: Tensor | None
    real: Tensor | None

    def tokens(self) -> Tensor:
        """``[batch · length]`` int64, the token behind each slot, on the host."""
        if self.start >= 0:
            return torch.arange(self.start, self.start + self.batch * self.length)
        return self.gather

    def read(self, x: Tensor) -> Tensor:
        """``[T, heads, D]`` to ``[batch, heads, length, D]``."""
        if self.start >= 0:
            x = x[self.start : self.start + self.batch * self.length]
        else:
            x = x.index_select(0, self.gather.to(x.device))
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)

    def write(self, into: Tensor, x: Tensor) -> None:
        """The reverse: ``[batch, heads, length, ...]`` to the tokens of ``into`` ``[T, heads, ...]``."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.start >= 0:
            into[self.start : self.start + self.batch * self.length] = x
        else:
            into.index_copy_(0, self.gather[self.real], x.index_select(0, self.real))


@lru_cache(maxsize=4)  # the layers of a step call it with equal arguments, forward and backward; other steps do not
def batches(segments: tuple[tuple[int, int], ...], padding: float = PADDING) -> tuple[Rows, ...]:
    """Batches of ``(start, length)`` segments of similar length (equal with ``padding=1``), without empty ones."""
    order = sorted((s for s in segments if s[1]), key=lambda s: (-s[1], s[0]))
    groups: list[list[tuple[int, int]]] = []
    tokens = 0
    for segment in order:
        if groups and groups[-1][0][1] * (len(groups[-1]) + 1) <= padding * (tokens + segment[1]):
            groups[-1].append(segment)
            tokens += segment[1]
        else:
            groups.append([segment])
            tokens = segment[1]
    return tuple(_rows(sorted(group)) for group in groups)


def _rows(group: Sequence[tuple[int, int]]) -> Rows:
    """One call; ``group`` in ascending order."""
    length = max(n for _, n in group)
    first = group[0][0]
    if all(at == first + i * length and n == length for i, (at, n) in enumerate(group)):
        return Rows(len(group), length, first, None, None)
    start, n = torch.tensor(group).t()
    slot = torch.arange(length)
    gather = start[:, None] + torch.minimum(slot, n[:, None] - 1)
    return Rows(len(group), length, -1, gather.flatten(), (slot < n[:, None]).flatten().nonzero().squeeze(1))
