"""Counts the tokens, forwards and images that pass through the models of a step, and the FLOP that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from prism_fast.track.flops import mlp_weights, tower_flops, trunk_flops

from .column import Column


@dataclass
class Count:
    """Of one phase: tokens (padding included), forwards and image encodes, counted apart with a graph for backward and
    without. ``flop``: matrix products, and attention at the pairs that see each other; a backward counts twice its
    forward, gradient checkpointing one forward more."""

    tokens: int = 0
    tokens_no_grad: int = 0
    forwards: int = 0
    forwards_no_grad: int = 0
    images: int = 0
    images_no_grad: int = 0
    flop: float = 0.0

    def add(self, name: str, amount: int) -> None:
        field = name if torch.is_grad_enabled() else f"{name}_no_grad"
        setattr(self, field, getattr(self, field) + amount)


@contextmanager
def counted(column: Column) -> Iterator[Count]:
    """Counts both models while the context is open."""
    count = Count()
    handles = []
    for backbone, head in column.models():
        again = bool(getattr(backbone.language_model, "gradient_checkpointing", False))
        for module, hook in (
            (backbone.language_model, _language(count, again)),
            (backbone.visual, _vision(count, again)),
            *([] if head is None else [(head, _head(count))]),
        ):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def units(again: bool) -> int:
    """The work of a forward together with its backward, in forwards."""
    return (4 if again else 3) if torch.is_grad_enabled() else 1


def _language(count: Count, again: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows, width = kwargs["inputs_embeds"].shape[:2]
        count.add("tokens", rows * width)
        count.add("forwards", 1)
        layout = kwargs.get("prefix_layout")
        pairs = rows * width * (width + 1) // 2 if layout is None else packed_pairs(layout)
        flop = trunk_flops(module.config, rows * width, pairs)
        if (scored := kwargs.get("score_rows")) is not None:  # the last layer's experts compute these rows alone
            flop -= 2 * mlp_weights(module.config) * (rows * width - len(scored))
        count.flop += units(again) * flop

    return hook


def packed_pairs(layout) -> int:
    """Pairs of a query and a key that it sees in a packed row."""
    lengths = [b - a for a, b in pairwise(layout.cu_branch.tolist())]
    prefixes = layout.prefix_len.tolist()
    return sum(
        n * (n + 1) // 2 + (n * prefixes[p] if p >= 0 else 0)
        for n, p in zip(lengths, layout.branch_prefix.tolist(), strict=True)
    )


def _vision(count: Count, again: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        grid: Tensor = args[1] if len(args) > 1 else kwargs["grid_thw"]
        count.add("images", len(grid))
        count.flop += units(again) * tower_flops(module.config, grid.tolist())

    return hook


def _head(count: Count):
    def hook(module: nn.Linear, args: tuple, kwargs: dict) -> None:
        hidden: Tensor = args[0]
        rows = hidden.numel() // hidden.shape[-1]
        count.flop += units(False) * 2 * rows * module.in_features * module.out_features

    return hook
