"""Tile sizes of the attention kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prism_fast.kernels.launch import card

MAX_WIDTH = 128


class Tile(NamedTuple):
    """Queries × keys of a tile in forward; in backward for the queries' gradient and for the keys'; warps and pipeline
    stages of each."""

    queries: int
    keys: int
    warps: int
    stages: int
    back_queries: int
    back_keys: int
    back_warps: int
    back_stages: int


# By major compute capability and bytes of an element. Chosen by what the compiler says: the largest tried without
# spills at heads of 64, 96 and 128 (float32: 16 bytes on one card, 4 on another). Not yet timed on any card.
TILES = {
    (8, 2): Tile(64, 32, 4, 2, 32, 64, 8, 2),
    (9, 2): Tile(128, 64, 8, 3, 64, 128, 8, 2),
    (10, 2): Tile(128, 64, 8, 3, 64, 128, 8, 1),
    # float32 is multiplied exactly, without tensor cores.
    (8, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
    (9, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
    (10, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
}


def tile_for(x: Tensor) -> Tile:
    """Raises NotImplementedError for a card without an entry."""
    _, capability = card(x.device)
    key = (capability // 10, x.element_size())
    if key not in TILES:
        raise NotImplementedError(f"shared-prefix attention: no tile for compute capability {capability / 10}")
    return TILES[key]


def block_width(width: int) -> int:
    """Columns of a tile that hold a head: a power of two that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())
