"""Helpers of every kernel launch: the card, the current device, scratch memory, the order of tiles."""

from prism_fast.kernels.launch.device import card, on_device, scratch
from prism_fast.kernels.launch.raster import tile_position

__all__ = ["card", "on_device", "scratch", "tile_position"]
