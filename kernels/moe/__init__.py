"""Mixture of SwiGLU experts: grouped products with device-side offsets, and the passes between products."""

from prism_fast.kernels.moe.products import rows_product, up_product
from prism_fast.kernels.moe.rows import clear_idle, combine_rows, gather_rows, swiglu, swiglu_gradient
from prism_fast.kernels.moe.tiles import TILES, Tile, Tiles, tiles_for
from prism_fast.kernels.moe.weights import weight_gradient

__all__ = [
    "TILES",
    "Tile",
    "Tiles",
    "tiles_for",
    "up_product",
    "rows_product",
    "weight_gradient",
    "gather_rows",
    "swiglu",
    "swiglu_gradient",
    "combine_rows",
    "clear_idle",
]
