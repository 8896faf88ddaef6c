"""Where the cases run: kernels in Triton's interpreter at small tiles, blocks and waves of a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.triton_device import DEVICE  # repairs the interpreter before kernels are imported


@contextmanager
def small(number: int) -> Iterator[None]:
    """What memory and tiles decide on a real machine, decided small, so that several blocks, waves and tiles meet.

    Every second case leaves the blocks of the reference as they are.
    """
    from prism_fast.kernels.attention import tiles as attention
    from prism_fast.kernels.logprob import tiles as logprob
    from prism_fast.kernels.moe import tiles as moe

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            tile = logprob.Tile(n=16, v=32, h=32, group=2, stages=2, warps=4, split=True)
            patch.setattr(logprob, "TILES", {b: tile._replace(split=not b.rich) for b in logprob.TILES})
            patch.setattr("prism_fast.ops.budgets.WAVE_UNIT", 8)
            patch.setattr("prism_fast.ops.budgets.WAVE_BYTES", 1)
            patch.setattr("prism_fast.ops.triton.linear_logprob.STATISTICS_ROWS", 8)
            product = moe.Tile(16, 16, 16, 2, 4)
            patch.setattr(moe, "TILES", {key: moe.Tiles(*[product] * len(moe.Tiles._fields)) for key in moe.TILES})
            block = attention.Tile(16, 16, 4, 1, 16, 32, 4, 1)
            patch.setattr(attention, "TILES", {key: block for key in attention.TILES})
        if number % 2:
            patch.setattr("prism_fast.ops.reference.linear_logprob.MIN_BLOCK_ROWS", 3)
            patch.setattr("prism_fast.ops.reference.linear_logprob.BLOCK_BYTES", {"cpu": 1})
            patch.setattr("prism_fast.ops.reference.softmax_rows.CHUNK_BYTES", {"cpu": 400})
            patch.setattr("prism_fast.ops.reference.shared_prefix_attention.BLOCK_BYTES", 4000)
        patch.delenv("PRISM_FAST_BACKEND", raising=False)
        yield
