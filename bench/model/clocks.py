"""The model's assumptions about an H200, and the time of a kernel on it. Clocks are those of one multiprocessor.

A tile's step occupies the matrix units for a known number of clocks; its instructions compete for the schedulers' issue
slots; its operands pass the port between L2 and the multiprocessor. The longest of the three is the time of the step. A
tile's epilogue adds to its steps: as Triton compiles it today, no part of it overlaps with the next tile's products.
Register banks and barriers are not modelled. The rate of L2 for all multiprocessors at once is not published for this
card: `SHARED`, that of the card before it per multiprocessor, is the worse case beside `PORT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

PROCESSORS = 132
SCHEDULERS = 4  # per multiprocessor, each issues an instruction of a warp per clock at most
MULTIPLY_ADDS = 2048  # per clock, dense, bfloat16
PORT = 64  # bytes per clock from L2, at most
SHARED = 5120 / PROCESSORS  # the same when all multiprocessors load at once
PEAK = 790e12  # FLOP/s that cuBLAS reached on the reference card at 8192 x 8192 x 8192, random bfloat16
BUSY = 0.93  # share of its clocks in which that product keeps the matrix units busy
CLOCK = PEAK / (2 * MULTIPLY_ADDS * PROCESSORS * BUSY)  # per second, under that load
BOOST = 1.98e9  # clocks per second while the matrix units are idle
COPY = 4.3e12  # bytes/s that a copy reads and writes there
GROUPED = 650e12  # FLOP/s of CUTLASS's grouped products, as published for experts of 4096 x 2048 on such a card
ISSUE = 0.65  # share of the issue slots that steps of dependent instructions fill
ISSUE_SOFTMAX = 0.75  # the same between the products of attention
PIPELINED = 900  # further clocks per tile, if the loads of the next tile run ahead
FILL = 1800  # the same, if the loads begin with the tile


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
        """Clocks in which a step occupies the matrix units."""
        return self.m * self.n * self.k / MULTIPLY_ADDS

    @property
    def traffic(self) -> float:
        """Bytes of operands per clock of the matrix units, two bytes a number."""
        return 2 * (self.m + self.n) * self.k / self.products

    def issue(self, instructions: float, share: float = 1.0) -> float:
        return instructions * self.warps / SCHEDULERS / share

    def clocks(self, depth: int, beside: int, port: float = PORT) -> float:
        """Clocks of a whole tile over a sum of ``depth`` numbers; ``beside``: `PIPELINED` or `FILL`."""
        step = max(self.products / BUSY, self.issue(self.step, ISSUE), self.products * self.traffic / port)
        return ceil(depth / self.k) * step + self.issue(self.epilogue) + beside

    def share(self, depth: int, beside: int, tiles: int, port: float = PORT) -> float:
        """Share of `PEAK`, with one program per multiprocessor for ``tiles`` of them."""
        rounds = ceil(tiles / PROCESSORS) * PROCESSORS
        useful = tiles * ceil(depth / self.k) * self.products / BUSY
        return useful / (rounds * self.clocks(depth, beside, port))


def pass_seconds(size: float, instructions: float = 0.0, warps: float = 0.0) -> float:
    """Seconds of a pass over ``size`` bytes, or of issuing ``instructions`` in each of ``warps`` warps if longer."""
    return max(size / COPY, instructions * warps / (PROCESSORS * SCHEDULERS * ISSUE * BOOST))


def makespan(programs: list[float], slots: int = PROCESSORS) -> float:
    """The time when the last program ends; programs start in order, each on the slot that is free first."""
    from heapq import heapify, heapreplace

    free = [0.0] * slots
    heapify(free)
    for length in programs:
        heapreplace(free, free[0] + length)
    return max(free)
