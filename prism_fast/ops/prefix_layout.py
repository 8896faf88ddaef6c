"""Checks that a layout fits its row, and preparation of a layout once for all layers of a model.

On the CPU a layout with bad values is refused by name; on a GPU nobody looks at them, and results are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose
from .flash import packed_backend
from .results import PrefixLayout, PreparedPrefix

OP = "shared_prefix_attention"
BACKENDS = ("reference", "triton", "stock")


def faults(layout: PrefixLayout, tokens: int) -> dict[str, Tensor]:
    """Rules for the values, each with a 0-d bool on the layout's device: whether the layout breaks it."""
    cu, start, length, named = (x.long() for x in layout[:4])
    segments, prefixes = named.shape[0], start.shape[0]
    own = cu.diff()
    found = {
        "cu_branch must start with 0": cu[0] != 0,
        "cu_branch must not decrease": (own < 0).any(),
        f"cu_branch must end within the {tokens} tokens": cu[-1] > tokens,
        f"branch_prefix must be -1 or the number of one of the {prefixes} prefixes": (
            (named < -1) | (named >= prefixes)
        ).any(),
        f"max_branch={layout.max_branch} must bound the segments' lengths": (own > layout.max_branch).any(),
    }
    if prefixes == 0:
        return found
    # A prefix must be this segment: the last one that is not empty and begins at or before the prefix.
    seen = torch.searchsorted(cu[1:].contiguous(), start, right=True).clamp(max=max(0, segments - 1))
    first, last = (cu[seen], cu[(seen + 1).clamp(max=segments)])
    outside = (length > 0) & ((start != first) | (start + length != last))
    found |= {
        "prefix_len must not be negative": (length < 0).any(),
        "prefix_start and prefix_len must be those of a segment": outside.any(),
        f"max_prefix={layout.max_prefix} must bound prefix_len": (length > layout.max_prefix).any(),
    }
    if layout.max_queries is not None:
        seeing = own.new_zeros(prefixes + 1).index_add(0, named.clamp(-1, prefixes - 1) + 1, own)[1:]
        seeing = torch.where(length > 0, seeing, 0)
        found[f"max_queries={layout.max_queries} must bound the tokens that see one prefix"] = (
            seeing > layout.max_queries
        ).any()
    return found


def misfit(layout: PrefixLayout, tokens: int) -> Tensor:
    """0-d bool on the layout's device: whether any value is bad."""
    return torch.stack(list(faults(layout, tokens).values())).any()


def fitting(layout: PrefixLayout, bad: Tensor) -> list[Tensor]:
    """The layout's four tensors, contiguous; if ``bad``, others whose segments are all empty, so that no index leaves
    the row."""
    return [torch.where(bad, nothing, x) for nothing, x in zip((0, 0, 0, -1), layout[:4], strict=True)]


def refuse_misfit(layout: PrefixLayout, tokens: int) -> None:
    """For a layout on the host. Raises ValueError that names the first fault."""
    for rule, broken in faults(layout, tokens).items():
        if broken:
            values = ", ".join(f"{name}={getattr(layout, name).tolist()}" for name in layout._fields[:4])
            raise ValueError(f"{OP}: layout.{rule}, got {values} for {tokens} tokens")


def prepare_prefix_layout(
    layout: PrefixLayout,
    *,
    tokens: int,
    heads: int,
    key_heads: int,
    width: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> PrefixLayout:
    """The same layout with the lists that ``shared_prefix_attention`` would otherwise compute in every call.

    They serve calls with q [tokens, heads, width] and k, v [tokens, key_heads, width] of ``dtype`` on the layout's
    device; calls with other shapes, dtypes or backends ignore them. A model prepares each row once for all layers,
    after the offsets have their final values. A captured CUDA graph follows new offsets only if it captures this call
    too.

    Cost: some seventy small launches on CUDA, which every layer would repeat in both directions.

    Raises:
        ValueError, RuntimeError: a backend that does not exist, or that this machine or device lacks.
    """
    some = torch.empty((), dtype=dtype, device=layout.cu_branch.device)
    q, k = (some.expand(tokens, n, width) for n in (heads, key_heads))
    if choose(OP, BACKENDS, backend, q, packed_backend(q, k)) != "triton":
        return layout
    from .triton.shared_prefix_attention import lists, takes

    if not takes(q, k):
        return layout
    return layout._replace(prepared=PreparedPrefix(row_of(q, k, layout), lists(q, k, layout)))


def row_of(q: Tensor, k: Tensor, layout: PrefixLayout) -> tuple[object, ...]:
    """The shapes, dtype and device that a preparation depends on, besides the layout's values."""
    return *q.shape, k.shape[1], layout.cu_branch.shape[0], q.dtype, q.device
