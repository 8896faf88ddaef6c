"""Tile sizes of the attention kernels, and the lists by which a launch finds its tiles without asking the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


class Tiles(NamedTuple):
    """Segments cut into tiles of ``block`` tokens. int32, on the device."""

    segment: Tensor  # [tiles] S where the list is longer than needed
    row: Tensor  # [tiles] first token


def cut(cu: Tensor, tokens: int, block: int) -> Tiles:
    """The tiles of all segments; their number is known on the device only, its bound here."""
    segments = cu.shape[0] - 1
    count = (cu[1:] - cu[:-1] + (block - 1)).div(block, rounding_mode="floor")
    last = count.cumsum(0)
    tile = torch.arange(tokens // block + segments, device=cu.device)
    segment = torch.searchsorted(last, tile, right=True)
    inside = segment.clamp(max=segments - 1)
    row = cu[inside] + (tile - (last - count)[inside]) * block
    return Tiles(segment.int(), row.int())


class Followers(NamedTuple):
    """Query tiles that see a segment as their prefix: ``tile[first[s] : first[s + 1]]``. int32."""

    tile: Tensor  # [tiles]
    first: Tensor  # [S + 1]


def followers(tiles: Tiles, cu: Tensor, prefix_start: Tensor, prefix_len: Tensor, branch_prefix: Tensor) -> Followers:
    """Who sees whom, sorted by the segment that is seen."""
    segments = cu.shape[0] - 1
    none = torch.full_like(branch_prefix[:1], segments)
    if prefix_start.shape[0]:
        seen = torch.searchsorted(cu, prefix_start, right=True, out_int32=True) - 1  # [P] segment of a prefix
        seen = torch.where(prefix_len > 0, seen, none)  # an empty one starts where another segment does
        owner = torch.where(branch_prefix >= 0, seen[branch_prefix.clamp(min=0).long()], none)
    else:
        owner = none.expand(segments)
    owner = torch.cat((owner, none))[tiles.segment.long()]  # [tiles]
    owner, order = owner.sort(stable=True)
    numbers = torch.arange(segments + 1, device=cu.device, dtype=owner.dtype)
    return Followers(order.int(), torch.searchsorted(owner, numbers, out_int32=True))
