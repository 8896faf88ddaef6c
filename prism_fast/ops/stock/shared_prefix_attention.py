"""Shared-prefix attention from PyTorch's own fused attention: no mask, no copy of a prefix, no scores in memory.

Two kinds of calls, each returning its output and the log-sum-exp of its scores:
(1) every segment with itself, causal;
(2) all branch tokens of a prefix with the whole prefix, dense: one call per prefix, however many branches.
A branch token's two results are joined by their log-sum-exps: with l = log(e^l1 + e^l2), out = e^(l1-l)·out1 +
e^(l2-l)·out2. Backward calls each kernel's backward with the *joint* output and log-sum-exp: its probabilities
exp(score - l) and its rowsum(dout·out) are then those of the joint softmax (the identity ring attention uses), so
query gradients add up and a prefix' key gradients are summed over its branches inside one call.

On the CPU. The kernel's segments are cut on the host, whose memory the offsets lie in.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prefix_operator import attention_operator, dense_heads, sum_dtype
from ..results import PrefixLayout
from .pieces import Rows, batches

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    """See ``prism_fast.ops.shared_prefix_attention``; arguments are already validated by the public op."""
    width, value_width = q.shape[2], v.shape[2]
    if width != value_width:  # the kernels take one width; zeros change neither scores nor the values kept
        common = max(width, value_width)
        q, k, v = (F.pad(x, (0, common - x.shape[2])) for x in (q, k, v))
    out, _ = _operator(q, k, v, layout.cu_branch, layout.prefix_start, layout.prefix_len, layout.branch_prefix, scale)
    return out[..., :value_width]


def _cut(
    cu_branch: Tensor, prefix_start: Tensor, prefix_len: Tensor, branch_prefix: Tensor
) -> tuple[tuple[Rows, ...], list[tuple[Rows, tuple[Rows, ...]]]]:
    """The calls of kind 1, and per prefix with branches its own rows and the rows of its branches' tokens."""
    cu = cu_branch.tolist()
    segments = tuple((a, b - a) for a, b in pairwise(cu))
    followers: dict[int, list[tuple[int, int]]] = {}
    for (start, length), prefix in zip(segments, branch_prefix.tolist(), strict=True):
        if prefix >= 0 and length:
            run = followers.setdefault(prefix, [])
            if run and sum(run[-1]) == start:  # neighbours make one run of tokens
                run[-1] = (run[-1][0], run[-1][1] + length)
            else:
                run.append((start, length))
    starts, lengths = prefix_start.tolist(), prefix_len.tolist()
    joined = []
    for prefix, runs in sorted(followers.items()):
        if lengths[prefix]:
            runs_of_rows = tuple(Rows(1, length, start, None, None) for start, length in runs)
            joined.append((Rows(1, lengths[prefix], starts[prefix], None, None), runs_of_rows))
    return batches(segments), joined


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], joint log-sum-exp [T, Hq] in float32, float64 for float64)."""
    q, k, v = dense_heads(q, k, v)
    tokens, heads = q.shape[:2]
    out = q.new_zeros(q.shape)
    total = q.new_zeros((tokens, heads), dtype=sum_dtype(q))
    own, joined = _cut(cu_branch, prefix_start, prefix_len, branch_prefix)
    for rows in own:
        part, lse = _forward(rows.read(q), rows.read(k), rows.read(v), 0.0, True, scale=scale)
        rows.write(out, part)
        rows.write(total, lse)
    for prefix, runs in joined:
        keys, values = prefix.read(k), prefix.read(v)
        for run in runs:
            part, lse = _forward(run.read(q), keys, values, 0.0, False, scale=scale)
            part, lse = part[0].transpose(0, 1), lse[0].t()  # [N, Hq, D], [N, Hq]
            mine = slice(run.start, run.start + run.length)
            weight = torch.sigmoid(lse - total[mine])[..., None]  # share of the prefix
            out[mine] = torch.lerp(out[mine].to(weight.dtype), part.to(weight.dtype), weight).to(out.dtype)
            total[mine] = torch.logaddexp(total[mine], lse)
    return out, total


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = dense_heads(grad, q, k, v)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    own, joined = _cut(cu_branch, prefix_start, prefix_len, branch_prefix)
    for rows in own:
        upstream = rows.read(grad)
        if rows.real is not None:  # the slots that repeat a token must add nothing
            kept = torch.zeros(rows.batch * rows.length, dtype=torch.bool).index_fill_(0, rows.real, True)
            upstream = upstream.masked_fill(~kept.view(rows.batch, 1, rows.length, 1), 0.0)
        inputs = (rows.read(q), rows.read(k), rows.read(v), rows.read(out), rows.read(total[..., None])[..., 0])
        parts = _backward(upstream, *inputs, 0.0, True, scale=scale)
        for into, part in zip((dq, dk, dv), parts, strict=True):
            rows.write(into, part)
    for prefix, runs in joined:
        at = slice(prefix.start, prefix.start + prefix.length)
        keys, values = prefix.read(k), prefix.read(v)
        for run in runs:
            inputs = (run.read(q), keys, values, run.read(out), run.read(total[..., None])[..., 0])
            parts = _backward(run.read(grad), *inputs, 0.0, False, scale=scale)
            dq[run.start : run.start + run.length] += parts[0][0].transpose(0, 1)
            dk[at] += parts[1][0].transpose(0, 1)
            dv[at] += parts[2][0].transpose(0, 1)
    return dq, dk, dv


_operator = attention_operator("shared_prefix_attention_stock", _run, _run_backward)
