"""A learned bias of the routers for captions and for reasonings, apart from what their tokens say.

The router logits of a row that belongs to a span get the bias of the span's kind and of the layer; a prompt's rows,
which all spans behind it share, get none. Which rows belong to what is known to the layouts; it travels as the argument
``span_bias`` of the language model, as the layout of packed rows does, through gradient checkpointing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

from prism_fast.models.experts import SparseBlock


class SpanBias(NamedTuple):
    """``bias`` [layers, kinds, E], the parameter; ``member`` [T, kinds] in its dtype: 1 where the row belongs to a span
    of the kind, otherwise 0."""

    bias: Tensor
    member: Tensor

    def of_layer(self, layer: int) -> Tensor:
        """[T, E]. A product, so that the gradient is one too: sums in a fixed order on every device."""
        return self.member @ self.bias[layer]


def span_bias(bias: Tensor, kind: Tensor) -> SpanBias:
    """``kind`` [T] int64: which of the bias's kinds a row's span is of, -1 for a row of no span."""
    kinds = torch.arange(bias.shape[1], device=kind.device)
    return SpanBias(bias, (kind[:, None] == kinds).to(bias.dtype))


class SpanLayer(Qwen3VLMoeTextDecoderLayer):
    """The stock layer, whose router with ``span_bias`` adds the layer's part of it to its logits."""

    def forward(self, hidden_states: Tensor, *args: object, span_bias: SpanBias | None = None, **kwargs: object):
        """hidden_states [B, S, H], with T = B·S rows of ``span_bias``."""
        if span_bias is None:
            return super().forward(hidden_states, *args, **kwargs)
        self.mlp.bias = span_bias.of_layer(self.self_attn.layer_idx)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.mlp.bias = None


def use_span_bias(backbone: nn.Module) -> None:
    """Let the sparse layers of a Qwen3-VL-MoE ``backbone`` take ``span_bias``, in place (idempotent)."""
    for layer in backbone.language_model.layers:
        if type(layer) is Qwen3VLMoeTextDecoderLayer and isinstance(layer.mlp, SparseBlock):
            layer.__class__ = SpanLayer
