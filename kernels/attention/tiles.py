"""Tile sizes of the attention kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prism_fast.kernels.launch import card

MAX_WIDTH = 128


class Tile(NamedTuple):
    """Queries × keys of a tile, warps and pipeline stages: of forward, then (``back_…``) of the kernels of backward."""

    queries: int
    keys: int
    warps: int
    stages: int
    back_queries: int
    back_keys: int
    back_warps: int
    back_stages: int


# By major compute capability and bytes of an element: the largest tile that we tried and that spills no register at
# heads of 64, 96 and 128 (float32: 16 bytes at heads of 32 on one card). No card has timed them yet.
TILES = {
    (8, 2): Tile(64, 32, 4, 2, 32, 64, 8, 2),
    (9, 2): Tile(128, 64, 8, 3, 64, 128, 8, 2),
    (10, 2): Tile(128, 64, 8, 3, 64, 128, 8, 1),
    # float32 is multiplied exactly, without tensor cores.
    (8, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
    (9, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
    (10, 4): Tile(32, 16, 8, 1, 16, 16, 8, 1),
}
# The tile above spills at these narrow heads. By the same and the columns of a tile (`block_width`): the fields that
# differ. Both changes also lower the number of instructions per pair of a query and a key.
NARROW = {
    (8, 2, 32): {"keys": 64},
    (10, 2, 64): {"back_warps": 4},
}


def tile_for(x: Tensor) -> Tile:
    """The tile for queries or keys ``x`` [T, heads, D]. Raises NotImplementedError for a card without an entry."""
    _, capability = card(x.device)
    key = (capability // 10, x.element_size())
    if key not in TILES:
        raise NotImplementedError(f"shared-prefix attention: no tile for compute capability {capability / 10}")
    return TILES[key]._replace(**NARROW.get((*key, block_width(x.shape[2])), {}))


def block_width(width: int) -> int:
    """Columns of a tile that hold a head: a power of two that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())
