"""``python -m tests.fuzz --cases 400 --seed 0 [--op NAME] [--backend NAME] [--case NUMBER [--cap SIZE]]``."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of a kernel
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    from . import every_op, report

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--backend", help="only this backend")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--cap", type=int, help="bound of every size of the case, as shrinking found it")
    parser.add_argument("--all", action="store_true", help="print every fault, not one of each kind")
    options = parser.parse_args()
    ops = every_op()
    wanted = [op for op in ops.values() if options.op is None or op.name in options.op]
    if not wanted:
        parser.error(f"--op {options.op} is not one of {', '.join(ops)}")
    bad = 0
    for op in wanted:
        start = time.time()
        numbers = range(options.cases) if options.case is None else [options.case]
        faults = report.search(op, options.seed, numbers, options.cap, options.backend)
        kinds = report.kinds(faults)
        print(f"{op.name}: {len(numbers)} cases, {len(kinds)} kinds of faults, {time.time() - start:.0f} s", flush=True)
        for found in faults if options.all else [group[0] for group in kinds.values()]:
            print(report.describe(op, found, len(kinds[report.kind(found)]), options.cap), flush=True)
        bad += len(kinds)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
