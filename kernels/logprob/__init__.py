"""Log-probabilities of chosen tokens without the full distribution in memory."""

from prism_fast.kernels.logprob.combine import Combined, combine_kernel, combine_partials
from prism_fast.kernels.logprob.forward import Scores, keep_buffer, scores, tile_width
from prism_fast.kernels.logprob.gradient import gradient_
from prism_fast.kernels.logprob.tiles import TILES, Tile

__all__ = [
    "Combined",
    "combine_kernel",
    "combine_partials",
    "Scores",
    "scores",
    "keep_buffer",
    "tile_width",
    "gradient_",
    "TILES",
    "Tile",
]
