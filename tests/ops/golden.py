"""Reading of the reference vectors, and padded -> packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def group_ids(index: list[str]) -> Tensor:
    """[B] ids in order of first appearance."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(name, len(known)) for name in index], dtype=torch.int64)


def packed(mask: list[list[float]]) -> tuple[Tensor, Tensor]:
    """(indices [N] of the active tokens in the flattened padded array, cu_seqlens [B+1] int32)."""
    active = torch.tensor(mask) != 0
    lengths = active.sum(1)
    return active.flatten().nonzero()[:, 0], torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
