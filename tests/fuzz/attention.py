"""``shared_prefix_attention``, segment by segment, with its prefix in front."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prism_fast import ops

from .draw import Case, Draw
from .op import Op


def draw(d: Draw) -> Case:
    dtype = d.dtype()
    key_heads = d.size(1, 3)
    heads = key_heads * d.size(1, 3)
    width = d.pick(8, 16, 32) if d.chance(0.6) else d.size(1, 20)
    value_width = width if d.chance(0.7) else d.size(1, 20)
    longest = 200 if d.large else 12
    lengths = d.lengths(d.size(0, 7), longest, longest)
    prefixes = [s for s in range(len(lengths)) if d.chance(0.4)]
    sees = [-1 if s in prefixes or not prefixes or d.chance(0.2) else d.pick(*prefixes) for s in range(len(lengths))]
    used = sum(lengths)
    tokens = used + (d.size(0, 4) if d.chance(0.4) else 0)
    scale = d.pick(1.0, 1.0, 0.2, 10.0)
    q = d.normal(tokens, heads, width, scale=scale)
    k = d.normal(tokens, key_heads, width)
    v = d.normal(tokens, key_heads, value_width, scale=d.pick(1.0, 30.0))
    if d.chance(0.15):
        k[:] = 1.0  # equal scores
    if d.chance(0.15):  # a mean far from 0: large scores with small differences
        q, k = q + 5.0, k + 5.0
    o = {"scale": d.pick(0.3, 1.0, 5.0, 1e-4)} if d.chance(0.5) else {}
    if d.chance(0.1):
        padding = torch.arange(tokens) >= used
        q, k, v = (d.junk(x, padding) for x in (q, k, v))
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    layout = {
        "cu_branch": torch.tensor([*starts, used], dtype=torch.int32),
        "prefix_start": torch.tensor([starts[s] for s in prefixes], dtype=torch.int32),
        "prefix_len": torch.tensor([lengths[s] for s in prefixes], dtype=torch.int32),
        "branch_prefix": torch.tensor([prefixes.index(s) if s >= 0 else -1 for s in sees], dtype=torch.int32),
    }
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)} | layout
    tensors = {name: d.strided(x) for name, x in tensors.items()}
    bounds = d.size(0, 5)
    queries = [sum(n for n, s in zip(lengths, sees, strict=True) if s == p) for p in prefixes]
    facts = {
        "dtype": dtype,
        "max_prefix": max([lengths[s] for s in prefixes], default=0) + bounds,
        "max_branch": max(lengths, default=0) + bounds,
        "max_queries": d.pick(None, max(queries, default=0) + bounds),
        "segments": [(a, n, s) for a, n, s in zip(starts, lengths, sees, strict=True)],
    }
    upstream = {"out": d.upstream((tokens, heads, value_width), dtype)}
    return Case(tensors, o, d.learns("q", "k", "v"), upstream, facts=facts, large=d.large)


def layout_of(case: Case, t: dict[str, Tensor | None]) -> ops.PrefixLayout:
    names = ("cu_branch", "prefix_start", "prefix_len", "branch_prefix")
    bounds = (case.facts[name] for name in ("max_prefix", "max_branch", "max_queries"))
    return ops.PrefixLayout(*(t[name] for name in names), *bounds)


def call(case: Case, t: dict[str, Tensor | None], backend: str | None) -> dict[str, Tensor]:
    return attend(case, t, layout_of(case, t), backend)


def attend(case: Case, t: dict[str, Tensor | None], layout: ops.PrefixLayout, backend: str | None) -> dict[str, Tensor]:
    return {"out": ops.shared_prefix_attention(t["q"], t["k"], t["v"], layout, **case.options, backend=backend)}


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, later: Tensor) -> Tensor:
    """[H, n, Dv]: n queries that do not see the keys ``later`` [n, m]."""
    score = (q @ k.transpose(1, 2) * scale).masked_fill(later, -torch.inf)
    return score.softmax(-1) @ v


class Fused(torch.autograd.Function):
    """The same in the steps of FlashAttention (arXiv 2205.14135, algorithms 2 and 4): backward forms the probabilities
    again from a log-sum-exp, and what they share from the rounded output."""

    @staticmethod
    def forward(ctx, q, k, v, scale, later):
        kind = torch.promote_types(q.dtype, torch.float32)
        given = (q, k, v)
        q, k, v = (x.to(kind) for x in given)
        score = (q @ k.transpose(1, 2) * scale).masked_fill(later, -torch.inf)
        lse = score.logsumexp(-1, keepdim=True)
        out = ((score - lse).exp() @ v).to(given[0].dtype)
        ctx.save_for_backward(*given, later, lse, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, g):
        *given, later, lse, out = ctx.saved_tensors
        q, k, v, g, out = (x.to(lse.dtype) for x in (*given, g, out))
        p = ((q @ k.transpose(1, 2) * ctx.scale).masked_fill(later, -torch.inf) - lse).exp()
        slope = p * (g @ v.transpose(1, 2) - (g * out).sum(-1, keepdim=True)) * ctx.scale
        found = (slope @ k, slope.transpose(1, 2) @ q, p.transpose(1, 2) @ g)
        return *(x.to(given[0].dtype) for x in found), None, None


def formula(case: Case, t: dict[str, Tensor | None], block: Callable[..., Tensor] = plain) -> dict[str, Tensor]:
    q, k, v = t["q"], t["k"], t["v"]
    group = q.shape[1] // k.shape[1]
    scale = case.options.get("scale", q.shape[2] ** -0.5)
    parts = []
    segments = case.facts["segments"]
    for start, length, sees in segments:
        own = list(range(start, start + length))
        before = list(range(segments[sees][0], segments[sees][0] + segments[sees][1])) if sees >= 0 else []
        queries = q[own].transpose(0, 1)  # [Hq, n, D]
        keys, values = (x[before + own].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        later = torch.arange(len(before) + length) > torch.arange(length)[:, None] + len(before)
        parts.append(block(queries, keys, values, scale, later).transpose(0, 1))
    used = sum(length for _, length, _ in segments)
    parts.append(torch.zeros((q.shape[0] - used, q.shape[1], v.shape[2]), dtype=q.dtype))
    return {"out": torch.cat(parts)}


def fused_formula(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return formula(case, t, Fused.apply)


def backends(case: Case) -> list[str]:
    width, value_width = case.tensors["q"].shape[2], case.tensors["v"].shape[2]
    fits = case.dtype != torch.float64 and width == value_width and not case.large
    return ["reference", "stock", *["triton"] * fits]


OPS = [Op("shared_prefix_attention", draw, call, formula, backends, fused=fused_formula)]
