"""Counts of the passes of a step, by hooks on the models: they show the passes that really ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from prism_fast.models.family import tower, trunk
from prism_fast.track.metrics import Metrics


@dataclass
class Passes:
    """Forwards through one model. ``learned``: with gradient; ``without_gradient``: the others (separate scoring, old
    log-probs or a reference would be counted here); ``recomputed``: forwards that gradient checkpointing repeated in
    the backward; ``images``: images that the vision tower encoded, with or without gradient."""

    learned: int = 0
    without_gradient: int = 0
    recomputed: int = 0
    images: int = 0

    def metrics(self, model: str) -> Metrics:
        """Counts by name; the report sums them up per stage."""
        metrics = Metrics()
        for kind, count in asdict(self).items():
            metrics.sum(f"passes/{model}_{kind}", count)
        return metrics


@contextmanager
def counted_passes(backbone: nn.Module) -> Iterator[Passes]:
    """Count the passes through ``backbone`` (``Qwen3VLModel`` or ``Qwen3VLMoeModel``) within the block, which must hold
    both forward and backward."""
    passes = Passes()

    def language(module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            passes.learned += 1
        else:
            passes.without_gradient += 1
        passes.recomputed -= 1  # the forward itself enters the first layer once

    def first_layer(module: nn.Module, args: tuple) -> None:
        passes.recomputed += 1

    def vision(module: nn.Module, args: tuple, kwargs: dict) -> None:
        passes.images += len(args[1] if len(args) > 1 else kwargs["grid_thw"])

    language_model = trunk(backbone)
    handles = [
        language_model.register_forward_pre_hook(language),
        language_model.layers[0].register_forward_pre_hook(first_layer),
        tower(backbone).register_forward_pre_hook(vision, with_kwargs=True),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
