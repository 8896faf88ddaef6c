"""Mixture of SwiGLU experts: grouped products with device-side offsets."""

from prism_fast.kernels.moe.forward import combine, rows_product, up_product
from prism_fast.kernels.moe.gradient import act_gradient, weight_gradient
from prism_fast.kernels.moe.tiles import TILES, Tile, Tiles, tiles_for

__all__ = [
    "TILES",
    "Tile",
    "Tiles",
    "tiles_for",
    "up_product",
    "rows_product",
    "combine",
    "act_gradient",
    "weight_gradient",
]
