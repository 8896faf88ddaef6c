"""The calls of shared-prefix attention on the CPU, which can read the offsets and group segments by them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .pieces import Rows, batches

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class HostCall(NamedTuple):
    """One call of PyTorch's fused CPU attention; results have the layout of ``queries`` and ``keys``."""

    queries: Rows
    keys: Rows
    causal: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """([batch, Hq, length, D], log-sum-exp [batch, Hq, length])."""
        return _forward(self.queries.read(q), self.keys.read(k), self.keys.read(v), 0.0, self.causal, scale=scale)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this call; ``out`` and ``total`` are the joint ones."""
        rows, upstream = self.queries, self.queries.read(grad)
        if rows.real is not None:  # the slots that repeat a token must add nothing
            kept = torch.zeros(rows.batch * rows.length, dtype=torch.bool).index_fill_(0, rows.real, True)
            upstream = upstream.masked_fill(~kept.view(rows.batch, 1, rows.length, 1), 0.0)
        joint = rows.read(out), rows.read(total[..., None])[..., 0]
        inputs = rows.read(q), self.keys.read(k), self.keys.read(v)
        return _backward(upstream, *inputs, *joint, 0.0, self.causal, scale=scale)


def host_calls(
    cu_branch: Tensor, prefix_start: Tensor, prefix_len: Tensor, branch_prefix: Tensor
) -> tuple[list[HostCall], list[HostCall]]:
    """(segments with themselves in few padded batches, per prefix one call for every run of adjacent branches)."""
    cu = cu_branch.tolist()
    segments = tuple((a, b - a) for a, b in pairwise(cu))
    followers: dict[int, list[tuple[int, int]]] = {}
    for (start, length), prefix in zip(segments, branch_prefix.tolist(), strict=True):
        if prefix >= 0 and length:
            run = followers.setdefault(prefix, [])
            if run and sum(run[-1]) == start:  # adjacent to the last branch: one run of tokens
                run[-1] = (run[-1][0], run[-1][1] + length)
            else:
                run.append((start, length))
    starts, lengths = prefix_start.tolist(), prefix_len.tolist()
    joined = [
        HostCall(_run(start, length), _run(starts[prefix], lengths[prefix]), False)
        for prefix, runs in sorted(followers.items())
        if lengths[prefix]
        for start, length in runs
    ]
    return [HostCall(rows, rows, True) for rows in batches(segments)], joined


def _run(start: int, length: int) -> Rows:
    return Rows(1, length, start, None, None)
