"""Sizes of a model from its configuration alone: parameters, cache, and tensors kept for a backward pass.

Models are instantiated on the meta device, which holds no values. The activation formulas count the tensors that
autograd keeps in transformers' own modules (sdpa attention); tests compare them with a real forward. With gradient
checkpointing these are the inputs of all layers and everything of the layer whose backward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeModel,
)

from prism_fast.models.discriminator import Discriminator
from prism_fast.models.lora import adapted_layers


@dataclass(frozen=True)
class ModelSize:
    """Counts of parameters (tied ones once) and of bytes. ``active``: parameters that one text token passes through,
    without embedding table and vision tower. Of the parameters that learn, by default all: ``tensors``, their number;
    ``master_bytes``: float32 copies of those of half precision; ``gradient_bytes``: accumulated gradients, in float32
    or wider. ``frozen_bytes``: weights that do not learn; ``vision_learns``, ``head_learns``: whether a parameter of
    the vision tower, or the output matrix, does; ``adapter_rows``: numbers per token that adapters keep for the
    backward."""

    parameters: int
    vision: int
    embedding: int
    experts: int
    active: int
    tensors: int
    weight_bytes: int
    master_bytes: int
    gradient_bytes: int
    frozen_bytes: int
    vision_learns: bool
    head_learns: bool
    adapter_rows: int


def policy_size(
    config: Qwen3VLConfig, dtype: torch.dtype, adapt: Callable[[nn.Module], None] = lambda policy: None
) -> ModelSize:
    """Size of a policy with this configuration in ``dtype``; ``adapt`` freezes some of it or adds adapters."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
        adapt(model)
    return _size(model, top_share=1.0)


def discriminator_size(config: Qwen3VLMoeConfig, dtype: torch.dtype) -> ModelSize:
    """Size of a discriminator (sparse backbone in ``dtype``, float32 score head)."""
    with torch.device("meta"):
        model = Discriminator(Qwen3VLMoeModel._from_config(config, dtype=dtype))
    text = config.text_config
    return _size(model, top_share=text.num_experts_per_tok / text.num_experts)


def _size(model: nn.Module, top_share: float) -> ModelSize:
    named = dict(model.named_parameters())  # tied tensors appear once

    def count(*parts: str) -> int:
        return sum(p.numel() for name, p in named.items() if any(part in name for part in parts))

    learning = {name: p for name, p in named.items() if p.requires_grad}
    head = getattr(model, "lm_head", None)
    total = count("")
    vision, embedding, experts = count(".visual."), count(".embed_tokens."), count(".mlp.experts.")
    return ModelSize(
        parameters=total,
        vision=vision,
        embedding=embedding,
        experts=experts,
        active=total - vision - embedding - experts + round(experts * top_share),
        tensors=len(learning),
        weight_bytes=sum(p.nbytes for p in named.values()),
        master_bytes=sum(4 * p.numel() for p in learning.values() if p.element_size() < 4),
        gradient_bytes=sum(max(4, p.element_size()) * p.numel() for p in learning.values()),
        frozen_bytes=sum(p.nbytes for p in named.values() if not p.requires_grad),
        vision_learns=any(".visual." in name for name in learning),
        head_learns=head is not None and head.weight.requires_grad,
        adapter_rows=sum(layer.lora_A.default.out_features for layer in adapted_layers(model).values()),
    )


def kv_bytes_per_token(text: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize


def language_activation_bytes(
    text: PreTrainedConfig,
    tokens: int,
    dtype: torch.dtype,
    *,
    sparse: bool = False,
    scored: int | None = None,
    checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps for a backward pass of the text trunk over ``tokens`` padded tokens.

    Per layer: two norms (their input widened to float32, the normalised rows, the inverse deviation), the inputs of
    the linear layers, the norms of queries and keys, attention (queries, keys, values, output, one float32 log-sum
    per head), and the MLP or, with ``sparse``, our router (its logits, weights and choices) and experts (the plan and
    the up-projection of ``top_k`` rows per token). ``scored``: rows that the last experts and the final norm of a
    sparse trunk compute; None: all (``models.score_rows``). ``checkpointing``: the peak of the backward pass.
    """
    e, wide = dtype.itemsize, max(4, dtype.itemsize)
    hidden = text.hidden_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    norm = (wide + e) * hidden + wide
    heads = text.num_attention_heads + text.num_key_value_heads
    head_norms = (wide + e) * (queries + keys) + wide * heads
    attention = 2 * e * (queries + keys) + 4 * text.num_attention_heads
    layer = 2 * norm + 2 * e * hidden + head_norms + attention
    layers, rotary, ids = text.num_hidden_layers, 2 * e * text.head_dim, 8
    inputs = 0
    if checkpointing:
        inputs, layers, scored = layers * e * hidden, 1, None
    if not sparse:
        return tokens * (inputs + layers * (layer + 4 * e * text.intermediate_size) + norm + rotary + ids)
    k, inner = text.num_experts_per_tok, text.moe_intermediate_size
    experts = e * text.num_experts + k * (wide + 8 + 8 + 4 + 4 + 2 * e * inner)
    last = tokens * (experts + norm)
    if scored is not None:  # gathered rows and their indices; the router still reads all rows
        last = scored * (experts + e * hidden + norm + 8)
    return tokens * (inputs + layers * layer + (layers - 1) * experts + rotary + ids) + last


def vision_activation_bytes(
    vision: PreTrainedConfig, patches: int, dtype: torch.dtype, *, checkpointing: bool = False
) -> int:
    """Bytes that autograd keeps for a backward pass of the vision tower over ``patches`` (before merging)."""
    e = dtype.itemsize
    width = vision.hidden_size
    layer = 11 * e * width + 4 * e + 4 * vision.num_heads + 2 * e * vision.intermediate_size
    unit = vision.spatial_merge_size**2
    deepstack = len(vision.deepstack_visual_indexes) * (3 * e * width * unit + 2 * e)  # per merged patch
    merger = 4 * e * width + 2 * e
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    positions = 4 * 8 + 4 * 4  # four interpolated table rows and their weights
    rotary = 2 * 4 * (width // vision.num_heads)
    blocks = layer + vision.depth * e * width if checkpointing else vision.depth * layer
    per_patch = blocks + merger + e * patch_width + positions + rotary
    return patches * per_patch + (patches // unit) * deepstack
