"""Attention for packed groups [prefix | branch ...] in which every branch sees its prefix and itself."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .flash import packed_backend
from .forms import plain, refuse_duals
from .prefix_layout import BACKENDS, OP
from .reference.shared_prefix_attention import shared_prefix_attention as reference
from .results import PrefixLayout

INT32 = (torch.int32,)


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Causal attention within each segment plus full attention to the segment's prefix.

    Args:
        q: [T, Hq, D] floating.
        k: [T, Hk, D], dtype of ``q``; Hq is a multiple of Hk (grouped-query attention).
        v: [T, Hk, Dv], dtype of ``q``.
        layout: the token axis as S consecutive segments. A prefix is itself a segment with ``branch_prefix`` -1; its
            branches name it by its index in ``prefix_start``. A segment without prefix is an ordinary sequence. A row
            may hold several groups and empty segments. ``prepare_prefix_layout`` does once the work that would be the
            same in all layers of a model.
        scale: of the scores, positive; None = 1 / sqrt(D).
        backend: None, "reference", "stock" (PyTorch's fused attention kernels, joined by log-sum-exp; on CUDA not
            float64, and in half precision heads of a multiple of 8 up to 256) or "triton" (CUDA; not float64; D = Dv <=
            128). None is "stock" on the CPU; on CUDA ``ops.flash`` decides by the card.

    Returns:
        [T, Hq, Dv] in the dtype of ``q``, 0 on padding (tokens past ``cu_branch[-1]``). Softmax and sums run in float32
        (float64 for float64). The fused backends compute the probabilities again in backward, from a log-sum-exp in
        float32: where scores reach hundreds, gradients are as exact as those of PyTorch's fused attention, but less
        exact than with a softmax that forward keeps.

    Raises:
        ValueError: wrong shape, dtype, device or scale; on the CPU also values of the layout that do not fit together
            or the T tokens. On other devices nobody looks at the values, and results and gradients are NaN.
        NotImplementedError: operands that "triton", or "stock" on CUDA, does not take; forward-mode derivatives and
            torch.func transforms in either.
        RuntimeError: a backend that this machine or device lacks.

    Cost: 2 Hq (D + Dv) FLOP forward for each pair of a token and one that it sees: a segment of n tokens behind a
    prefix of p has n (n + 1) / 2 + n p of them.

    Source: equal to attention over every branch with its prefix repeated in front (arXiv 2506.05433, Prefix Grouper).
    """
    checks.tensor(OP, "q", q, shape=(None, None, None))
    tokens, heads, width = q.shape
    checks.tensor(OP, "k", k, shape=(tokens, None, width), dtypes=(q.dtype,), like=q)
    checks.tensor(OP, "v", v, shape=(tokens, k.shape[1], None), dtypes=(q.dtype,), like=q)
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{OP}: {heads} query heads are not a multiple of {k.shape[1]} key heads")
    if not isinstance(layout, PrefixLayout):
        raise ValueError(f"{OP}: layout must be a PrefixLayout, got {type(layout).__name__}")
    checks.tensor(OP, "layout.cu_branch", layout.cu_branch, shape=(None,), dtypes=INT32, like=q)
    segments = layout.cu_branch.shape[0] - 1
    if segments < 0:
        raise ValueError(f"{OP}: layout.cu_branch must hold S + 1 offsets and starts with 0; it is empty")
    checks.tensor(OP, "layout.branch_prefix", layout.branch_prefix, shape=(segments,), dtypes=INT32, like=q)
    checks.tensor(OP, "layout.prefix_start", layout.prefix_start, shape=(None,), dtypes=INT32, like=q)
    prefixes = layout.prefix_start.shape[0]
    checks.tensor(OP, "layout.prefix_len", layout.prefix_len, shape=(prefixes,), dtypes=INT32, like=q)
    for name in ("max_prefix", "max_branch", "max_queries"):
        bound = getattr(layout, name)
        if bound is None and name == "max_queries":
            continue
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0:
            raise ValueError(f"{OP}: layout.{name}={bound!r} must be an integer >= 0")
    if scale is not None:
        checks.number(OP, "scale", scale, low=0.0, strict=True)
    scale = width**-0.5 if scale is None else float(scale)
    checks.memory(OP, q)
    chosen = choose(OP, BACKENDS, backend, q, packed_backend(q, v))
    if chosen != "reference" and plain(q):
        refuse_duals(OP, chosen, q, k, v)
    if chosen == "triton":
        from .triton.shared_prefix_attention import shared_prefix_attention as fused

        return fused(q, k, v, layout, scale=scale)
    if chosen == "stock":
        from .stock.shared_prefix_attention import shared_prefix_attention as composed

        return composed(q, k, v, layout, scale=scale)
    return reference(q, k, v, layout, scale=scale)
