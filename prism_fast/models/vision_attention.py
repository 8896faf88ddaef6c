"""The vision tower's attention over images of any sizes in few calls, however many images there are."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from prism_fast.models.family import tower
from prism_fast.ops.stock.pieces import Rows, batches
from prism_fast.ops.stock.varlen import varlen_attention


class BatchedVisionAttention(nn.Module):
    """Replaces the stock module, which splits its tokens into images, reads their lengths from the device in every
    layer and computes them one by one. Keeps ``qkv`` and ``proj``, so parameter names do not change."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = stock.qkv, stock.proj
        self.num_heads, self.scaling = stock.num_heads, stock.scaling

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        frame_lengths: tuple[int, ...] | None = None,
        **_: object,
    ) -> Tensor:
        """``hidden_states`` ``[N, W]``, one frame after the other; ``frame_lengths``: their lengths on the host (None:
        read from ``cu_seqlens`` ``[frames + 1]``, which synchronises a GPU)."""
        if frame_lengths is None:
            frame_lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        tokens = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).view(tokens, 3, self.num_heads, -1).unbind(1)  # [N, heads, D]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        if _has_varlen_kernel(q):
            out = varlen_attention(q, k, v, cu_seqlens, max(frame_lengths), scale=self.scaling)
        else:
            out = _by_size(q, k, v, frame_lengths, self.scaling)
        return self.proj(out.reshape(tokens, -1))


def _has_varlen_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _by_size(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """``[N, heads, D]``; all frames of one size are one call."""
    calls, order = _calls(lengths)
    parts = [
        F.scaled_dot_product_attention(rows.read(q), rows.read(k), rows.read(v), scale=scale)
        .transpose(1, 2)
        .flatten(0, 1)
        for rows in calls
    ]
    return parts[0] if order is None else torch.cat(parts)[order.to(q.device)]


@lru_cache(maxsize=16)
def _calls(lengths: tuple[int, ...]) -> tuple[tuple[Rows, ...], Tensor | None]:
    """One call per size, and the place of each token in their joined outputs (None: unchanged). Cached, because every
    layer asks for it."""
    calls = batches(tuple(zip(accumulate(lengths, initial=0), lengths, strict=False)), padding=1.0)
    if len(calls) == 1 and calls[0].start >= 0:
        return calls, None
    return calls, torch.cat([rows.tokens() for rows in calls]).argsort()


def use_batched_vision_attention(model: nn.Module) -> None:
    """Swap it into every block of a Qwen3-VL(-MoE) model, or of its backbone, in place (idempotent)."""
    for block in tower(model).blocks:
        if not isinstance(block.attn, BatchedVisionAttention):
            block.attn = BatchedVisionAttention(block.attn)
