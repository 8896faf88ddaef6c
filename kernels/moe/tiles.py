"""Tile shapes of the expert products, by card and width of the numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prism_fast.kernels.launch import card


class Tile(NamedTuple):
    """Output tile ``m × n``, depth ``k`` per step, pipeline stages, warps."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


class Tiles(NamedTuple):
    """One tile per product. The tile of ``up`` holds ``n`` gate and ``n`` up columns."""

    up: Tile
    rows: Tile
    weights: Tile


_HALF = Tiles(
    up=Tile(128, 128, 64, 3, 8),
    rows=Tile(128, 256, 64, 3, 8),
    weights=Tile(128, 256, 64, 3, 8),
)
_AMPERE = Tiles(
    up=Tile(128, 64, 32, 4, 8),
    rows=Tile(128, 128, 32, 4, 8),
    weights=Tile(128, 128, 32, 4, 8),
)
# Depth 64 takes one register too many with weights in the checkpoint's orientation [E, H, 2I].
_BLACKWELL = _HALF._replace(up=Tile(128, 128, 32, 4, 8))
# fp32 products run on the plain arithmetic units, one number at a time: small tiles.
_FLOAT32 = Tiles(up=Tile(64, 32, 16, 2, 8), rows=Tile(64, 64, 16, 2, 8), weights=Tile(64, 64, 16, 2, 8))
# By (compute capability, bytes per number).
TILES = {
    (80, 2): _AMPERE,
    (90, 2): _HALF,
    (100, 2): _BLACKWELL,
    (80, 4): _FLOAT32,
    (90, 4): _FLOAT32,
    (100, 4): _FLOAT32,
}


def tiles_for(x: torch.Tensor) -> Tiles:
    """The tiles of the newest card in the table that is not newer than that of ``x``.

    Raises NotImplementedError for a card older than the table's.
    """
    capability = card(x.device)[1]
    known = [c for c, size in TILES if size == x.element_size() and c <= capability]
    if not known:
        raise NotImplementedError(
            f"moe_experts: no Triton tiles for compute capability {capability / 10} and {x.dtype}; "
            "pass backend='reference'"
        )
    return TILES[max(known), x.element_size()]
