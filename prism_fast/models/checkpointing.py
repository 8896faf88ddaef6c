"""Gradient checkpointing: a layer keeps its input alone, and its forward runs again in the backward pass."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def use_gradient_checkpointing(model: nn.Module) -> None:
    """Switch it on for every layer of the Qwen3-VL(-MoE) model or backbone in ``model``, those of the vision
    tower too, in place (idempotent). It acts in train mode where gradients are on; results are the same to the bit.

    The form that needs no input with a gradient is chosen: it keeps a layer's keyword arguments (the layout of packed
    rows, the rows that are scored) and works where embeddings are frozen.

    Raises:
        ValueError: ``model`` holds no model of transformers.
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"gradient checkpointing: {type(model).__name__} holds no model of transformers")
    found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
