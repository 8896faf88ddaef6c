"""What really passes through the models of a step: tokens, forwards, images, and the FLOP that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .column import Column


@dataclass
class Count:
    """Of one phase: tokens (padding included), forwards and image encodes, those with a graph for the backward and
    those without. ``flop``: products of matrices and attention at the pairs that see each other; a backward counts
    twice its forward, gradient checkpointing one forward more."""

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
    """What passes through both models while the context is open."""
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
    """Forwards that a forward costs together with its backward."""
    return (4 if again else 3) if torch.is_grad_enabled() else 1


def _language(count: Count, again: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows, width = kwargs["inputs_embeds"].shape[:2]
        count.add("tokens", rows * width)
        count.add("forwards", 1)
        layout = kwargs.get("prefix_layout")
        pairs = rows * width * (width + 1) // 2 if layout is None else packed_pairs(layout)
        text = module.config
        attention = 4 * text.num_attention_heads * text.head_dim * pairs
        flop = text.num_hidden_layers * (attention + 2 * (mixing_weights(text) + mlp_weights(text)) * rows * width)
        if (scored := kwargs.get("score_rows")) is not None:  # the last layer's experts compute these rows alone
            flop -= 2 * mlp_weights(text) * (rows * width - len(scored))
        count.flop += units(again) * flop

    return hook


def packed_pairs(layout) -> int:
    """Queries and keys that see each other in a packed row."""
    lengths = [b - a for a, b in pairwise(layout.cu_branch.tolist())]
    prefixes = layout.prefix_len.tolist()
    return sum(
        n * (n + 1) // 2 + (n * prefixes[p] if p >= 0 else 0)
        for n, p in zip(lengths, layout.branch_prefix.tolist(), strict=True)
    )


def mixing_weights(text) -> int:
    """Entries of the attention's matrices in one layer."""
    return text.hidden_size * text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)


def mlp_weights(text) -> int:
    """Entries of the matrices behind the attention that a token is multiplied with: router and chosen experts, or the
    dense layer's three."""
    experts = getattr(text, "num_experts", None)
    if experts is None:
        return 3 * text.hidden_size * text.intermediate_size
    return text.hidden_size * (experts + 3 * text.num_experts_per_tok * text.moe_intermediate_size)


def _vision(count: Count, again: bool):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        grid: Tensor = args[1] if len(args) > 1 else kwargs["grid_thw"]
        count.add("images", len(grid))
        vision = module.config
        patches = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        per_patch = sum(p.numel() for part in (module.patch_embed, module.blocks) for p in part.parameters())
        mergers = sum(p.numel() for part in (module.merger, module.deepstack_merger_list) for p in part.parameters())
        per_patch += mergers / vision.spatial_merge_size**2
        attention = 4 * vision.hidden_size * sum(n * n for n in patches) * vision.depth
        count.flop += units(again) * (2 * per_patch * sum(patches) + attention)

    return hook


def _head(count: Count):
    def hook(module: nn.Linear, args: tuple, kwargs: dict) -> None:
        hidden: Tensor = args[0]
        rows = hidden.numel() // hidden.shape[-1]
        count.flop += units(False) * 2 * rows * module.in_features * module.out_features

    return hook
