"""Prints the model of the Triton kernels: `python3 -m prism_fast.bench.model`. Exit code 1 if it misses a goal."""

from __future__ import annotations

import argparse
from pathlib import Path

from .kernels import TABLE, Line, default_experts, head, own_experts, read
from .prefix import loops, schedule

HEADER = """\
A model, not a measurement: shares of an H200's peak, from the instructions in {table}
and the assumptions in bench/model/clocks.py. No kernel has run for it.
"""


def every(table: dict[str, dict]) -> list[Line]:
    areas = (head, schedule, default_experts, own_experts, loops)
    return [line for area in areas for line in area(table)]


def text(line: Line) -> str:
    worse = f"{100 * line.worse:4.0f} %" if line.worse is not None else "      "
    goal = "" if line.goal is None else f"  goal {line.goal:g} {'met' if line.met else 'MISSED'}"
    share = f"{line.share:6.2f}" if line.at_most else f"{100 * line.share:4.0f} %"
    return f"{line.kernel:<44} {line.shape:<34} {share} {worse}  {line.note}{goal}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="another kernel_forms.json")
    lines = every(read(parser.parse_args().table))
    print(HEADER.format(table=TABLE.name))
    print(f"{'kernel':<44} {'shape':<34} model  worse  (worse: L2 shared out among all multiprocessors)")
    for line in lines:
        print(text(line))
    return int(any(not line.met for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
