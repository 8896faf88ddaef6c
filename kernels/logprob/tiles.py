"""Tile sizes of the scores kernel per card and shape, and how to measure them anew.

The table is fixed; nothing is searched for at start-up. PRISM_FAST_AUTOTUNE=1 measures `candidates` at the first shape
of each bucket in a process, and logs each winner as a table entry.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

AUTOTUNE = "PRISM_FAST_AUTOTUNE"
FEW_ROWS = 64


class Tile(NamedTuple):
    """Tile of ``n`` rows × ``v`` columns, depth ``h`` per step, tile rows per raster group, pipeline stages, warps,
    and whether the epilogue takes one half of the columns after the other. That needs fewer registers where these hold
    the accumulators; on Blackwell a memory of their own holds them, and splitting them is expensive."""

    n: int
    v: int
    h: int
    group: int
    stages: int
    warps: int
    split: bool


class Bucket(NamedTuple):
    """What a tile depends on."""

    capability: int  # × 10
    bytes: int  # of an operand's element
    few: bool  # at most `FEW_ROWS` rows
    rich: bool  # with a soft cap: more arithmetic per score, so that only a smaller tile does not spill


# The width does not depend on the number of rows: backward reads kept exponentials in the tiles of forward.
TILES = {
    Bucket(80, 2, few=False, rich=False): Tile(128, 128, 32, 8, 3, 8, False),
    Bucket(80, 2, few=False, rich=True): Tile(128, 128, 32, 8, 3, 8, False),
    Bucket(80, 2, few=True, rich=False): Tile(64, 128, 64, 8, 3, 4, False),
    Bucket(80, 2, few=True, rich=True): Tile(64, 128, 64, 8, 3, 4, False),
    Bucket(90, 2, few=False, rich=False): Tile(128, 256, 64, 8, 3, 8, True),
    Bucket(90, 2, few=False, rich=True): Tile(128, 128, 64, 8, 4, 8, True),
    Bucket(90, 2, few=True, rich=False): Tile(64, 256, 64, 8, 3, 4, True),
    Bucket(90, 2, few=True, rich=True): Tile(64, 128, 64, 8, 4, 4, True),
    # Depth 64 takes two registers too many where scores are kept without entropy.
    Bucket(100, 2, few=False, rich=False): Tile(128, 256, 32, 8, 4, 8, False),
    Bucket(100, 2, few=False, rich=True): Tile(128, 128, 64, 8, 4, 8, False),
    Bucket(100, 2, few=True, rich=False): Tile(64, 256, 64, 8, 3, 8, False),
    Bucket(100, 2, few=True, rich=True): Tile(64, 128, 64, 8, 4, 8, False),
}
# float32 operands are multiplied exactly, without tensor cores: one tile for everything.
TILES |= {
    Bucket(capability, 4, few=few, rich=rich): Tile(64, 64, 16, 8, 3, 8, False)
    for capability in (80, 90, 100)
    for few in (False, True)
    for rich in (False, True)
}
# Minor versions and families that share an entry.
SAME = {86: 80, 87: 80, 89: 80, 103: 100}

_measured: dict[Bucket, Tile] = {}


def bucket_of(capability: int, rows: int, dtype: torch.dtype, rich: bool) -> Bucket:
    """Raises NotImplementedError for a card without an entry."""
    capability = SAME.get(capability, capability)
    bucket = Bucket(capability, dtype.itemsize, rows <= FEW_ROWS, rich)
    if bucket not in TILES:
        cards = sorted({b.capability for b in TILES} | set(SAME))
        raise NotImplementedError(f"no tile for compute capability {capability / 10} and {dtype}; cards: {cards}")
    return bucket


def tile_for(capability: int, rows: int, dtype: torch.dtype, rich: bool = False) -> Tile:
    """The tile in use: measured in this process, or from the table. ``rich``: with a soft cap."""
    bucket = bucket_of(capability, rows, dtype, rich)
    return _measured.get(bucket, TILES[bucket])


def retune(capability: int, rows: int, dtype: torch.dtype, rich: bool, launch: Callable[[Tile], object]) -> None:
    """With PRISM_FAST_AUTOTUNE=1, time ``launch`` with every candidate for this bucket, once; the fastest stays."""
    bucket = bucket_of(capability, rows, dtype, rich)
    if os.environ.get(AUTOTUNE, "0") != "1" or bucket in _measured or torch.cuda.is_current_stream_capturing():
        return
    times = {}
    for tile in candidates(bucket):
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: launch(tile))
        except triton.runtime.errors.OutOfResources:  # the candidate is too large for this card
            continue
    _measured[bucket] = best = min(times, key=times.get)
    logging.getLogger(__name__).warning("    %r: %r,  # %.3f ms", bucket, best, times[best])


def candidates(bucket: Bucket) -> list[Tile]:
    """Tiles worth measuring for a bucket, all of the width that the table gives, the table's own first."""
    first = TILES[bucket]
    depths = (first.h, 2 * first.h)
    found = [
        first._replace(h=h, group=g, stages=s, warps=w) for h in depths for g in (8, 16) for s in (3, 4) for w in (4, 8)
    ]
    return list(dict.fromkeys([first, *found]))
