"""Runs the launch code of every Triton kernel under a recording driver; one JSON line per kernel and architecture.

A program for a process of its own: `python -m tests.kernels.compile_kernels 80 90 100`;
`--shipped` adds the kernels of the head at every tile in the tables and those of the experts, which takes minutes;
without it the head's are compiled at one tile, for Hopper.
"""

from __future__ import annotations

import json
import sys

import torch

from prism_fast.kernels import moe
from prism_fast.kernels.logprob import TILES as SCORE_TILES
from prism_fast.kernels.logprob import combine_partials, gradient_, scores
from tests.support.triton_aot import RecordingDriver


def launch_combine() -> None:
    # Left alone, Triton would compile 1, multiples of 16 and other numbers apart.
    for splits, rows in ((5, 96), (5, 37), (1, 37), (16, 1)):
        m, s, u = (torch.zeros((splits, rows)) for _ in range(3))
        combine_partials(m, s, u, torch.zeros(rows))


def launch_scores(sm: int, shipped: bool) -> None:
    """The scores and gradient kernels at every shipped tile of the card, or at the first one alone."""
    tiles = [(bucket, tile) for bucket, tile in SCORE_TILES.items() if bucket.capability == sm]
    for bucket, tile in tiles if shipped else tiles[:1]:
        dtype = torch.bfloat16 if bucket.bytes == 2 else torch.float32
        rows = 32 if bucket.few else 256
        weight = torch.zeros((512, 128), dtype=dtype)
        options = {"bias": weight[:, 0].contiguous(), "softcap": 30.0} if bucket.rich else {}
        # Training, and statistics alone; another row count must not compile anew.
        for n, learns in ((rows, True), (rows - 3, True), (rows, False)):
            target, heat, g = torch.zeros(n, dtype=torch.int64), torch.ones(1), torch.ones(n)
            hidden = torch.zeros((n, 128), dtype=dtype)
            found = scores(hidden, weight, target, heat, **options, entropy=learns, keep=learns, tile=tile)
            for h in (g, None) if learns else ():
                gradient_(found, target, heat, g, h, 512, softcap=options.get("softcap"))


def launch_experts(sm: int) -> None:
    """Every product of the experts at the tiles of the card, with weights in either orientation."""
    tokens, hidden, inner, experts, top_k = 300, 256, 512, 4, 2
    slots = tokens * top_k
    permutation = torch.zeros(slots, dtype=torch.int64)
    token, offsets = torch.zeros(slots, dtype=torch.int32), torch.zeros(experts + 1, dtype=torch.int32)
    weights, slot, plan = torch.zeros(tokens, top_k), token.view(tokens, top_k), (token, offsets)
    for dtype in (torch.bfloat16, torch.float32):
        tiles = moe.TILES[sm, dtype.itemsize]
        zeros = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype)  # noqa: E731
        x, pre, act = zeros(tokens, hidden), zeros(slots, 2 * inner), zeros(slots, inner)
        for hub in (False, True):
            gate_up, down = zeros(experts, 2 * inner, hidden), zeros(experts, hidden, inner)
            if hub:
                gate_up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (gate_up, down))
            for outputs in ((pre, act), (None, act), (pre, None)):
                moe.up_product(x, gate_up, *plan, tiles.up, pre=outputs[0], act=outputs[1])
            moe.rows_product(act, down, None, offsets, tiles.rows)
            moe.rows_product(x, down.transpose(1, 2), *plan, tiles.rows)
            moe.rows_product(pre, gate_up.transpose(1, 2), None, offsets, tiles.rows)
            moe.weight_gradient(down, x, act, *plan, tiles.weights, gather_a=True, gather_b=False)
            moe.weight_gradient(gate_up, pre, x, *plan, tiles.weights, gather_a=False, gather_b=True)
        moe.gather_rows(x, token)
        moe.swiglu(pre)
        moe.swiglu_gradient(act, pre, weights, permutation)
        for given in (weights, None):
            moe.combine_rows(zeros(slots, hidden), slot, given)
        moe.clear_idle(gate_up, offsets)


def main(archs: list[int], shipped: bool) -> None:
    for sm in archs:
        driver = RecordingDriver(sm)
        driver.install()
        launch_combine()
        if shipped or sm == 90:
            launch_scores(sm, shipped)
        if shipped:
            launch_experts(sm)
        for c in driver.compiled:
            fields = {k: getattr(c, k) for k in ("kernel", "arch", "registers", "shared", "stack", "spills")}
            uses = {"wgmma": "wgmma.mma_async" in c.ptx, "tcgen05": "tcgen05.mma" in c.ptx}
            uses["tma"] = "cp.async.bulk.tensor" in c.ptx
            print(json.dumps(fields | uses))
            print(c.row(), file=sys.stderr)


if __name__ == "__main__":
    shipped = "--shipped" in sys.argv
    main([int(a) for a in sys.argv[1:] if a != "--shipped"], shipped)
