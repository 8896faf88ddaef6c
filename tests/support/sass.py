"""Reads the machine code of a compiled kernel: instructions of its main loops, spills, double precision, matrix units.

The disassembler is the one that Triton brings. A listing becomes basic blocks, these a graph, and natural loops are
found in it by dominators. A main loop is an innermost one that holds matrix instructions, or any innermost loop of a
kernel without them; its *step* is the shortest way around it through such an instruction, so that what a flattened
loop does only now and then (the end of a tile) does not count.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\w+|\$\S+):")
TARGET = re.compile(r"`\((\.L_x_\w+|\$\S+)\)")
GUARD = re.compile(r"^@!?U?P\w+\s+")
# Arithmetic and comparisons in double precision, and conversions to or from it.
DOUBLE = re.compile(r"^(D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|[FI]2[FI](P)?\b.*\bF?\.?F64\b|MUFU\.\w+64H\b)")
MATRIX = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL_BYTES = {"": 4, "8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16}
SMALL = 16  # a loop of fewer instructions waits for a barrier


@dataclass(frozen=True)
class Instruction:
    text: str  # without the predicate
    guarded: bool

    @property
    def opcode(self) -> str:
        return self.text.split()[0]


@dataclass
class Block:
    instructions: list[Instruction]
    follows: list[int]  # numbers of the blocks that may come next


def listing(cubin: Path) -> str:
    return subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout


class Code:
    """One kernel's machine code from the text of ``nvdisasm -c``."""

    def __init__(self, text: str) -> None:
        self.blocks = _blocks(text)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [i for block in self.blocks for i in block.instructions]

    @property
    def total(self) -> int:
        return len(self.instructions)

    @property
    def double(self) -> list[str]:
        """Instructions in double precision."""
        return [i.text for i in self.instructions if DOUBLE.match(i.text)]

    @property
    def spills(self) -> int:
        """Bytes per thread that stores to local memory write: registers that had no place."""
        kinds = [i.opcode.split(".")[1:] for i in self.instructions if i.opcode.split(".")[0] == "STL"]
        return sum(next((SPILL_BYTES[m] for m in kind if m in SPILL_BYTES), 4) for kind in kinds)

    @property
    def units(self) -> set[str]:
        """Kinds of matrix instructions: HMMA, HGMMA (wgmma), UTCHMMA and relatives (tcgen05)."""
        return {i.opcode.split(".")[0] for i in self.instructions if MATRIX.match(i.text)}

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """Blocks of each natural loop; those that share a header are one."""
        found: dict[int, set[int]] = {}
        for tail, block in enumerate(self.blocks):
            for header in block.follows:
                if header in self._dominators[tail]:
                    found.setdefault(header, {header}).update(self._body(header, tail))
        return [frozenset(blocks) for _, blocks in sorted(found.items())]

    def steps(self) -> list[tuple[frozenset[int], int]]:
        """(blocks, instructions of a step) of each main loop, in the order of the code."""
        wanted = {n for n, block in enumerate(self.blocks) if any(MATRIX.match(i.text) for i in block.instructions)}
        loops = [loop for loop in self.loops if self.size(loop) >= SMALL and (not wanted or loop & wanted)]
        inner = [loop for loop in loops if not any(other < loop for other in loops)]
        return [(loop, self._shortest(loop, loop & wanted)) for loop in inner]

    def size(self, blocks: frozenset[int]) -> int:
        return sum(len(self.blocks[n].instructions) for n in blocks)

    def walk(self) -> frozenset[int] | None:
        """The outermost loop around the main loops: in a persistent kernel, the one over its tiles."""
        inner = [loop for loop, _ in self.steps()]
        around = [loop for loop in self.loops if any(loop >= one for one in inner)]
        return max(around, key=self.size, default=None)

    @cached_property
    def _before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.blocks]
        for n, block in enumerate(self.blocks):
            for after in block.follows:
                before[after].append(n)
        return before

    @cached_property
    def _dominators(self) -> list[set[int]]:
        """Per block, the blocks on every way to it; none for code that cannot be reached from the first block."""
        reached, open_ = {0}, [0]
        while open_:
            for n in self.blocks[open_.pop()].follows:
                if n not in reached:
                    reached.add(n)
                    open_.append(n)
        found = [set(reached) if n in reached else set() for n in range(len(self.blocks))]
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for n in sorted(reached - {0}):
                new = set.intersection(*(found[b] for b in self._before[n] if b in reached)) | {n}
                if new != found[n]:
                    found[n], changed = new, True
        return found

    def _body(self, header: int, tail: int) -> set[int]:
        body, open_ = {header, tail}, [tail]
        while open_:
            n = open_.pop()
            if n == header:
                continue
            for b in self._before[n]:
                if b not in body:
                    body.add(b)
                    open_.append(b)
        return body

    def _shortest(self, loop: frozenset[int], through: frozenset[int]) -> int:
        """Instructions of the shortest way around ``loop``, through one of ``through`` if there are any."""
        header = next(n for n in loop if all(n in self._dominators[m] for m in loop))
        ways = [self._distance(loop, header, header)] if not through or header in through else []
        ways += [self._distance(loop, header, n) + self._distance(loop, n, header) for n in through - {header}]
        return min(ways)

    def _distance(self, loop: frozenset[int], start: int, stop: int) -> int:
        """Instructions from the first of ``start`` to before ``stop``; all around where they are the same block."""
        best = {start: 0}
        open_ = [start]
        arrived: list[int] = []
        while open_:
            n = open_.pop(0)
            for m in self.blocks[n].follows:
                cost = best[n] + len(self.blocks[n].instructions)
                if m == stop:
                    arrived.append(cost)
                elif m in loop and cost < best.get(m, 1 << 60):
                    best[m] = cost
                    open_.append(m)
        return min(arrived)


def _blocks(text: str) -> list[Block]:
    lines: list[tuple[list[str], Instruction]] = []
    labels: list[str] = []
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels.append(found[1])
        elif found := INSTRUCTION.match(line):
            whole = found[2]
            bare = GUARD.sub("", whole)
            lines.append((labels, Instruction(bare, bare != whole)))
            labels = []
    # What follows the code: a branch to itself and empty instructions up to the next multiple of 128 bytes.
    lines = [
        (names, i)
        for names, i in lines
        if i.opcode != "NOP" and not (i.opcode == "BRA" and any(f"`({n})" in i.text for n in names))
    ]
    starts, place = [], {}
    leave = True
    for n, (names, i) in enumerate(lines):
        if names or leave:
            starts.append(n)
        place |= {name: len(starts) - 1 for name in names}
        leave = _branches(i)
    blocks = []
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True)):
        instructions = [i for _, i in lines[first:last]]
        end = instructions[-1]
        follows = [place[t] for t in TARGET.findall(end.text) if t in place] if _branches(end) else []
        if number + 1 < len(starts) and not _final(end):
            follows.append(number + 1)
        blocks.append(Block(instructions, list(dict.fromkeys(follows))))
    return blocks


def _branches(i: Instruction) -> bool:
    return i.opcode.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BREAK", "BSYNC")


def _final(i: Instruction) -> bool:
    """Whether the next instruction in the listing never follows."""
    kind = i.opcode.split(".")[0]
    if i.guarded or kind in ("CALL", "BSYNC", "BREAK"):
        return False
    if kind == "BRA":  # with an operand before its target, or divergent, it may fall through
        return re.fullmatch(r"BRA\s+`\(\S+\)", i.text) is not None
    return kind in ("EXIT", "RET", "JMP", "BRX")
