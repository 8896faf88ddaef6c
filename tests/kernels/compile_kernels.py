"""Runs the launch code of every Triton kernel under a recording driver; one JSON line per kernel and architecture.

A program for a process of its own: `python -m tests.kernels.compile_kernels 80 90 100`.
"""

from __future__ import annotations

import json
import sys

import torch

from prism_fast.kernels.gemm import TILES, matmul
from prism_fast.kernels.logprob import combine_partials
from tests.support.triton_aot import RecordingDriver


def launch_everything(sm: int) -> None:
    # Left alone, Triton would compile 1, multiples of 16 and other numbers apart.
    for splits, rows in ((5, 96), (5, 37), (1, 37), (16, 1)):
        m, s, u = (torch.zeros((splits, rows)) for _ in range(3))
        combine_partials(m, s, u, torch.zeros(rows))
    if sm < 90:
        return  # bulk tensor copies begin with Hopper
    # The three products of a language-model head, small: hidden·Wᵀ, dZ·W and dZᵀ·hidden.
    hidden, weight, dz = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((256, 128), (512, 128), (256, 512)))
    for out_dtype in (torch.bfloat16, torch.float32):
        for a, b in ((hidden, weight.t()), (dz, weight), (dz.t(), hidden)):
            matmul(a, b, out_dtype=out_dtype, tile=TILES[sm // 10])


def main(archs: list[int]) -> None:
    for sm in archs:
        driver = RecordingDriver(sm)
        driver.install()
        launch_everything(sm)
        for c in driver.compiled:
            fields = {k: getattr(c, k) for k in ("kernel", "arch", "registers", "shared", "stack", "spills")}
            uses = {"wgmma": "wgmma.mma_async" in c.ptx, "tcgen05": "tcgen05.mma" in c.ptx}
            uses["tma"] = "cp.async.bulk.tensor" in c.ptx
            print(json.dumps(fields | uses))
            print(c.row(), file=sys.stderr)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
