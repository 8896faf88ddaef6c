"""Shared-prefix attention: how busy its loops keep the matrix units, how evenly programs share the work of a prefix."""

from __future__ import annotations

from itertools import accumulate

from .clocks import BUSY, CLOCK, ISSUE_SOFTMAX, MULTIPLY_ADDS, PROCESSORS, SCHEDULERS, makespan, pass_seconds
from .kernels import Line, entry

WIDTH = 128  # of a head
PRODUCTS = {"attend_kernel": 2, "queries_kernel": 3, "keys_kernel": 4}  # of tiles, in a step
# Prompt, response, branches, heads, key heads: the 4B policy's, the discriminator's.
SHAPES = ((1024, 1024, 16, 32, 8), (2048, 512, 16, 16, 8))
EVEN = 1.1  # goal: at most so many times the time of work that is divided evenly


def step(row: dict, products: int) -> tuple[float, float]:
    """(clocks of the matrix units, clocks in all) of a step, in which softmax and products take turns."""
    matrix = products * row["sizes"]["queries"] * row["sizes"]["keys"] * WIDTH / MULTIPLY_ADDS
    return matrix, matrix / BUSY + max(row["steps"]) * row["warps"] / SCHEDULERS / ISSUE_SOFTMAX


def loops(table: dict[str, dict]) -> list[Line]:
    lines = []
    for kernel, products in PRODUCTS.items():
        row = entry(table, "attention bf16 32+8x128", kernel)
        matrix, whole = step(row, products)
        note = f"{'+'.join(str(n) for n in row['steps'])} instructions a step, softmax and products in turns"
        name = f"attention, {kernel.removesuffix('_kernel')}"
        lines.append(Line(name, "32 + 8 heads of 128", matrix / BUSY / whole, note=note))
    return lines


def schedule(table: dict[str, dict]) -> list[Line]:
    """The keys' gradient of one packed row: the programs of the launch's own lists in their order, then the sums of the
    parts, relative to the time of the same work divided evenly."""
    import torch

    from prism_fast.kernels.attention import TILES, lists

    found, tile = [], TILES[9, 2]
    for prompt, response, branches, heads, key_heads in SHAPES:
        lengths = [prompt, *[response] * branches]
        tokens, segments = sum(lengths), len(lengths)
        layout = ([0, *accumulate(lengths)], [0], [prompt], [-1, *[0] * branches])
        plan = lists.plan(tokens, segments, heads, key_heads, WIDTH, tile)
        made = lists.make_lists(plan, *(torch.tensor(x, dtype=torch.int32) for x in layout), torch.tensor(False))
        parts = lists.view_lists(plan, made).parts.tolist()
        real = [part for part in parts if part[0] < segments]
        row = entry(table, f"attention bf16 {heads}+{key_heads}x{WIDTH}", "keys_kernel")
        _, whole = step(row, PRODUCTS["keys_kernel"])
        rest = row["epilogue"] * row["warps"] / SCHEDULERS
        work = [heads // key_heads * (part[4] - part[3] + part[6] - part[5]) * whole for part in real]
        programs = [clocks + rest for clocks in work for _ in range(key_heads)]
        partial = sum(part[7] >= 0 for part in real) * key_heads * 2 * tile.back_keys * WIDTH * 4
        sums = pass_seconds(2.0 * partial) * CLOCK
        even = key_heads * sum(work) / PROCESSORS
        ratio = (makespan(programs) + sums) / even
        note = f"{len(programs)} programs, {partial / 2**20:.0f} MiB of parts' sums; times the balanced schedule"
        shape = f"P {prompt}, R {response} x {branches}, {heads} + {key_heads} heads"
        found.append(Line("attention, keys' gradient shared out", shape, ratio, None, EVEN, note, at_most=True))
    return found
