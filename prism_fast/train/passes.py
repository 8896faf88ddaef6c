"""Which passes a step really ran, counted at the models and not from what the code means to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from prism_fast.models.family import tower, trunk


@dataclass
class Passes:
    """Forwards through one model. ``learned``: with the graph of a backward; ``without_gradient``: the others (scoring
    apart from learning, old log-probs and a reference would be such); ``recomputed``: forwards that gradient
    checkpointing did again in the backward; ``images``: images encoded by the vision tower, either way."""

    learned: int = 0
    without_gradient: int = 0
    recomputed: int = 0
    images: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.learned + other.learned,
            self.without_gradient + other.without_gradient,
            self.recomputed + other.recomputed,
            self.images + other.images,
        )

    def numbers(self, model: str) -> dict[str, int]:
        """For the metrics; the report sums them up per stage."""
        return {
            f"passes/{model}_learned": self.learned,
            f"passes/{model}_without_gradient": self.without_gradient,
            f"passes/{model}_recomputed": self.recomputed,
            f"passes/{model}_images": self.images,
        }


@contextmanager
def counted_passes(backbone: nn.Module) -> Iterator[Passes]:
    """What passes through ``backbone`` (``Qwen3VLModel`` or ``Qwen3VLMoeModel``) while the context is open; forward and
    backward must both lie in it."""
    passes = Passes()

    def language(module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            passes.learned += 1
        else:
            passes.without_gradient += 1
        passes.recomputed -= 1  # its own pass through the first layer is none

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
