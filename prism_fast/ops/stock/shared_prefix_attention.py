"""Shared-prefix attention from PyTorch's own fused attention: no mask, no copy of a prefix, no scores in memory.

Two kinds of calls, each returning its output and the log-sum-exp of its scores:
(1) every segment with itself, causal;
(2) all branch tokens of a prefix with the whole prefix, dense.
Their log-sum-exps join a branch token's two results: with l = log(e^l1 + e^l2), out = e^(l1-l)·out1 + e^(l2-l)·out2.
Backward calls each kernel's backward with the *joint* output and log-sum-exp: its probabilities exp(score - l) and its
rowsum(dout·out) are then those of the joint softmax (an identity that ring attention uses too). So query gradients add
up, and one call sums a prefix's key gradients over its branches.

Only the calls differ between devices: ``host_calls`` reads the offsets and groups segments on the CPU; ``device_calls``
passes the offsets to kernels that read them on the GPU, one call of each kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prefix_layout import OP, refuse_misfit
from ..prefix_operator import attention_operator, dense_heads, sum_dtype
from ..results import PrefixLayout
from .device_calls import Calls, device_calls
from .host_calls import host_calls


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    """See ``prism_fast.ops.shared_prefix_attention``; the public op has already validated the arguments.

    Raises:
        NotImplementedError: on CUDA, operands that neither of PyTorch's kernels takes.
    """
    width, value_width = q.shape[2], v.shape[2]
    if width != value_width:  # the kernels take one width; zero columns change neither scores nor the other columns
        common = max(width, value_width)
        q, k, v = (F.pad(x, (0, common - x.shape[2])) for x in (q, k, v))
    return _operator(q, k, v, *layout[:7], scale)[0][..., :value_width]


def _calls(q: Tensor, *layout: Tensor | int | None) -> Calls:
    if q.is_cuda:
        return device_calls(q, *layout)
    return Calls(*host_calls(*layout[:4]), q.new_zeros(()))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    max_prefix: int,
    max_branch: int,
    max_queries: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], joint log-sum-exp [Hq, T] in float32, float64 for float64)."""
    q, k, v = dense_heads(q, k, v)
    layout = cu_branch, prefix_start, prefix_len, branch_prefix, max_prefix, max_branch, max_queries
    if not q.is_cuda:
        refuse_misfit(PrefixLayout(*layout), q.shape[0])
    own, joined, outside = _calls(q, *layout)
    out = q.new_empty(q.shape).copy_(outside)
    joint = q.new_empty((q.shape[1], q.shape[0]), dtype=sum_dtype(q)).copy_(outside)
    total = joint.t()  # calls index tokens first; the GPU's kernels store a head's tokens contiguously
    for call in own:
        part, lse = call.attend(q, k, v, scale)
        call.queries.write(out, part)
        call.queries.write(total, lse)
    for call in joined:
        part, lse = call.attend(q, k, v, scale)
        mine, sums = call.queries.read(out), call.queries.read(total[..., None])[..., 0]  # views
        weight = torch.sigmoid(lse - sums)[..., None]  # share of the prefix
        # Both products read half precision and compute in the sums' dtype; only the result of addcmul is rounded.
        torch.addcmul(mine * (1 - weight), part, weight, out=mine)
        torch.logaddexp(sums, lse, out=sums)
    return out, joint


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    joint: Tensor,
    cu_branch: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    branch_prefix: Tensor,
    max_prefix: int,
    max_branch: int,
    max_queries: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = dense_heads(grad, q, k, v)
    total = joint.t()
    layout = cu_branch, prefix_start, prefix_len, branch_prefix, max_prefix, max_branch, max_queries
    own, joined, outside = _calls(q, *layout)
    dq, dk, dv = (x.new_empty(x.shape).copy_(outside) for x in (q, k, v))
    for call in own:
        parts = call.gradients(grad, q, k, v, out, total, scale)
        for into, part in zip((dq, dk, dv), parts, strict=True):
            call.queries.write(into, part)
    for call in joined:
        parts = call.gradients(grad, q, k, v, out, total, scale)
        for into, rows, part in zip((dq, dk, dv), (call.queries, call.keys, call.keys), parts, strict=True):
            rows.read(into).add_(part)
    return dq, dk, dv


_operator = attention_operator(OP, "stock", _run, _run_backward)
