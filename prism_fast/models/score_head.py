"""The discriminator's score head, and where a checkpoint folder holds it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from prism_fast.models.checkpoints import SHARD_INDEX, find_tensor, open_weights, weight_files

HEAD_KEY = "v_head.1.weight"


class ScoreHead(nn.Linear):
    """``Linear(H, 1, bias=False)`` without the last axis: hidden [..., H] to scores [...].

    It sums per row instead of a matrix product: the result cannot depend on the row's place in the batch, so equal
    hidden states give equal scores to the bit. ``as_published``: the product of ``nn.Linear`` instead.
    """

    def __init__(self, hidden_size: int, *, device: torch.device) -> None:
        super().__init__(hidden_size, 1, bias=False, device=device)

    def reset_parameters(self) -> None:
        """Set zeros: the weight is set right after construction, so no random number is drawn for it."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor, *, as_published: bool = False) -> Tensor:
        if as_published:
            return super().forward(hidden).squeeze(-1)
        return (hidden * self.weight[0].to(hidden.dtype)).sum(-1)


def read_head(folder: Path, hidden_size: int) -> Tensor:
    """The head [1, H] of a discriminator folder.

    Raises:
        ValueError: there is none, or it has another shape.
    """
    source = find_tensor(folder, HEAD_KEY)
    if source is None:
        searched = weight_files(folder)
        raise ValueError(
            f"{searched[0] if len(searched) == 1 else folder / SHARD_INDEX} has no {HEAD_KEY}: it has no score head. "
            "Use a discriminator checkpoint or build one from a dense policy with `prism-fast convert upcycle`"
        )
    with open_weights(source) as tensors:
        head = tensors.get_tensor(HEAD_KEY)
    if tuple(head.shape) != (1, hidden_size):
        raise ValueError(f"{HEAD_KEY} in {source} has shape {tuple(head.shape)}, expected {(1, hidden_size)}")
    return head


def write_side_head(head: Tensor, folder: Path) -> None:
    """``value_head.pt`` beside the weights, for TRL-style readers; never read here."""
    torch.save({"v_head.summary.weight": head.cpu()}, folder / "value_head.pt")
