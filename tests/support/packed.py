"""Hidden states of packed rows."""

from __future__ import annotations

from torch import Tensor, nn

from prism_fast.models.packing import PackedRow, SharedImages, packed_outputs


def packed_hidden_states(backbone: nn.Module, row: PackedRow, images: SharedImages | None = None) -> Tensor:
    """Final-norm hidden states [T, H] of a packed row in the model's dtype."""
    return packed_outputs(backbone, row, images).last_hidden_state[0]
