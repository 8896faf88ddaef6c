"""The order in which persistent programs walk over output tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile in grouped raster order: GROUP tile rows share their columns of B while it is in L2."""
    per_group = GROUP * tiles_n
    first_row = (tile // per_group) * GROUP
    rows = tl.minimum(tiles_m - first_row, GROUP)
    within = tile % per_group
    return first_row + within % rows, within // rows
