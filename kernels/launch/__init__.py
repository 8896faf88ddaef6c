"""What every kernel launch needs: the card and its current device, scratch memory, the order of tiles."""

from prism_fast.kernels.launch.device import card, on_device, scratch
from prism_fast.kernels.launch.raster import tile_position

__all__ = ["card", "on_device", "scratch", "tile_position"]
