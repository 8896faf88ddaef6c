"""What the model takes an H200 to be, and how long a kernel runs on it. Clocks are those of one multiprocessor.

A tile's step occupies the matrix units for a known number of clocks; its instructions compete for the schedulers' issue
slots; its operands pass the port between L2 and the multiprocessor. The longest of the three is the step. A tile's
epilogue is added to its steps: nothing of it runs beside the next tile's products, which is what Triton compiles today.
Banks of registers and barriers are not modelled. What L2 gives to all multiprocessors at once is not published for this
card: `SHARED` is what the card before it gives per clock, shared out, and stands beside `PORT` as the worse case.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

PROCESSORS = 132
SCHEDULERS = 4  # per multiprocessor, each issues an instruction of a warp per clock at most
MULTIPLY_ADDS = 2048  # per clock, dense, bfloat16
PORT = 64  # bytes per clock from L2, at most
SHARED = 5120 / PROCESSORS  # the same where all ask at once
PEAK = 790e12  # FLOP/s that cuBLAS reached on the reference card at 8192 x 8192 x 8192, random bfloat16
BUSY = 0.93  # of its clocks, the share in which it keeps the matrix units busy
CLOCK = PEAK / (2 * MULTIPLY_ADDS * PROCESSORS * BUSY)  # per second, under that load
BOOST = 1.98e9  # clocks per second where the matrix units rest
COPY = 4.3e12  # bytes/s that a copy reads and writes there
GROUPED = 650e12  # FLOP/s of CUTLASS's grouped products, as published for experts of 4096 x 2048 on such a card
ISSUE = 0.65  # of the issue slots, the share that steps of dependent instructions fill
ISSUE_SOFTMAX = 0.75  # the same between the products of attention
PIPELINED = 900  # clocks per tile beside its instructions, where the next tile's loads run already
FILL = 1800  # the same where they begin with the tile


@dataclass(frozen=True)
class Tile:
    """An output tile ``m x n`` whose steps are ``k`` deep; instructions per warp of a step and of the rest."""

    m: int
    n: int
    k: int
    warps: int
    step: int
    epilogue: int

    @property
    def products(self) -> float:
        """Clocks that a step occupies the matrix units."""
        return self.m * self.n * self.k / MULTIPLY_ADDS

    @property
    def traffic(self) -> float:
        """Bytes of operands per clock of the matrix units, two bytes a number."""
        return 2 * (self.m + self.n) * self.k / self.products

    def issue(self, instructions: float, share: float = 1.0) -> float:
        return instructions * self.warps / SCHEDULERS / share

    def clocks(self, depth: int, beside: int, port: float = PORT) -> float:
        """Of a whole tile over a sum of ``depth`` numbers; ``beside``: `PIPELINED` or `FILL`."""
        step = max(self.products / BUSY, self.issue(self.step, ISSUE), self.products * self.traffic / port)
        return ceil(depth / self.k) * step + self.issue(self.epilogue) + beside

    def share(self, depth: int, beside: int, tiles: int, port: float = PORT) -> float:
        """Of `PEAK`, with ``tiles`` of them walked over by one program per multiprocessor."""
        rounds = ceil(tiles / PROCESSORS) * PROCESSORS
        useful = tiles * ceil(depth / self.k) * self.products / BUSY
        return useful / (rounds * self.clocks(depth, beside, port))


def pass_seconds(size: float, instructions: float = 0.0, warps: float = 0.0) -> float:
    """Of a pass over ``size`` bytes of memory, or of issuing ``instructions`` in each of ``warps`` warps."""
    return max(size / COPY, instructions * warps / (PROCESSORS * SCHEDULERS * ISSUE * BOOST))


def makespan(programs: list[float], slots: int = PROCESSORS) -> float:
    """When the last program ends, each started in order on the slot that is free first."""
    from heapq import heapify, heapreplace

    free = [0.0] * slots
    heapify(free)
    for length in programs:
        heapreplace(free, free[0] + length)
    return max(free)
