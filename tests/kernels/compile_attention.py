"""Runs the launch code of the attention kernels under a recording driver; one JSON line per kernel and architecture.

A program for a process of its own: `python -m tests.kernels.compile_attention 80 90 100` compiles every shipped tile at
every head width that a model of ours has; `--small` only bfloat16 at 128.
"""

from __future__ import annotations

import json
import sys

import torch

from prism_fast.kernels.attention import TILES, Tile, attend, gradients
from tests.ops.test_shared_prefix_attention import layout_of
from tests.support.triton_aot import RecordingDriver


def launch(width: int, dtype: torch.dtype, segments: list[tuple[int, int]], tile: Tile) -> None:
    layout = layout_of(segments)[:4]
    tokens = int(layout[0][-1])
    q, k, v = (torch.zeros((tokens, heads, width), dtype=dtype) for heads in (32, 8, 8))
    out, lse = attend(q, k, v, *layout, 0.1, tile=tile)
    gradients(q, q, k, v, out, lse, *layout, 0.1, tile=tile)


def main(archs: list[int], widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    for sm in archs:
        driver = RecordingDriver(sm)
        driver.install()
        for width in widths:
            for dtype in dtypes:
                # Other lengths and numbers of segments, a multiple of 16 among them, must not compile anew.
                tile = TILES[sm // 10, dtype.itemsize]
                launch(width, dtype, [(40, -1), (30, 0), (1, 0)], tile)
                launch(width, dtype, [(33, -1), *[(16, 0)] * 15], tile)
                for c in driver.compiled:
                    fields = {k: getattr(c, k) for k in ("kernel", "arch", "registers", "shared", "stack", "spills")}
                    uses = {"wgmma": "wgmma.mma_async" in c.ptx, "tcgen05": "tcgen05.mma" in c.ptx}
                    print(json.dumps({**fields, **uses, "width": width, "dtype": str(dtype)}))
                    print(width, dtype, c.row(), file=sys.stderr)
                driver.compiled.clear()


if __name__ == "__main__":
    archs = [int(a) for a in sys.argv[1:] if a != "--small"]
    if "--small" in sys.argv:
        main(archs, (128,), (torch.bfloat16,))
    else:
        main(archs, (64, 96, 128), (torch.bfloat16, torch.float32))
