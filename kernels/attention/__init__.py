"""Attention over packed rows whose branches share a prefix: two ranges of keys per tile of queries, no mask tensor."""

from prism_fast.kernels.attention.backward import gradients
from prism_fast.kernels.attention.forward import attend
from prism_fast.kernels.attention.lists import make_lists, plan_for
from prism_fast.kernels.attention.tiles import MAX_WIDTH, TILES, Tile

__all__ = ["attend", "gradients", "make_lists", "plan_for", "MAX_WIDTH", "TILES", "Tile"]
