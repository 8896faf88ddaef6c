"""Gradient checkpointing: a layer keeps only its input, and its forward runs again in the backward pass."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def use_gradient_checkpointing(model: nn.Module) -> None:
    """Switch it on for every layer of the Qwen3-VL(-MoE) model or backbone in ``model``, vision tower included, in
    place (idempotent). It acts in train mode where gradients are on; results are the same to the bit.

    Uses the non-reentrant form: it keeps a layer's keyword arguments (the layout of packed rows, the rows to be scored)
    and works where embeddings are frozen.

    Raises:
        ValueError: ``model`` holds no model of transformers.
    """
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if pretrained is None:
        raise ValueError(f"gradient checkpointing: {type(model).__name__} holds no model of transformers")
    pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
