"""Threads of a block do not race, and a barrier too few is found: by an order of theirs, or by ThreadSanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux") or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)

from tests.support.cuda_card import CSRC, build, passed, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

CALLS = "tests/native/test_repeated_calls.py"
# Threads of the operating system are slow: small shapes, every path.
SMALL = "group_advantage or policy_loss or pairwise_loss or selected_logprob or one or many"


def sanitized(changed: dict[str, str] | None, *what: str) -> subprocess.CompletedProcess:
    """Under ThreadSanitizer, the threads of a block being threads of the operating system."""
    library = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no libtsan")
    options = "ignore_noninstrumented_modules=1 exitcode=66"
    return run(build(changed, "thread"), *what, PRISM_CARD_THREADS="1", LD_PRELOAD=library, TSAN_OPTIONS=options)


def test_threads_of_a_block_do_not_race():
    done = sanitized(None, CALLS, "-s", "-k", SMALL)
    assert done.returncode == 0 and passed(done) == 6, done.stdout[-3000:] + done.stderr[-6000:]


def without(source: str, line: str, which: int) -> dict[str, str]:
    """``source`` without the occurrence number ``which`` of ``line``."""
    text = (CSRC / source).read_text()
    places = [m.start() for m in re.finditer(re.escape(line), text)]
    return {source: text[: places[which]] + text[places[which] + len(line) :]}


SITES = [
    ("block.cuh", "__syncthreads();", 0, "group_advantage"),
    ("block.cuh", "__syncthreads();", 1, "group_advantage"),
    ("teams.cuh", "__syncwarp();", 0, "group_advantage"),
    ("pairwise_loss.cu", "__syncwarp();", 0, "pairwise_loss"),
    ("policy_loss.cu", "cooperative_groups::this_grid().sync();", 0, "policy_loss"),
    ("route_experts.cu", "cooperative_groups::this_grid().sync();", 0, "many"),
    ("route_experts.cu", "cooperative_groups::this_grid().sync();", 1, "many"),
    *(("route_experts.cu", "__syncthreads();", i, "many") for i in (1, 2, 3, 4, 6)),
]


# Nothing is found without these: today the barriers of somebody else come in between. Each orders its own function's
# use of a shared array, which is then right whoever calls it.
SPARE = [
    ("pairwise_loss.cu", "__syncthreads();", 0),  # pair_column adds up sums next, and each sum brings two barriers
    ("route_experts.cu", "__syncthreads();", 0),  # choose_chunk: store_counts brings two between chunks
    ("route_experts.cu", "__syncthreads();", 5),  # start_of_experts: place_chunk brings two before it reads the starts
]


@pytest.mark.parametrize(("source", "barrier", "which", "op"), SITES)
def test_a_barrier_too_few_is_found(source, barrier, which, op):
    """Each barrier of the kernels is needed: without it, results differ or a race is reported."""
    changed = without(source, barrier, which)
    done = run(build(changed), CALLS, "-k", op)
    if done.returncode < 0 or "1 failed" in done.stdout:
        return
    done = sanitized(changed, CALLS, "-s", "-k", op)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


def test_every_barrier_is_tried():
    """No kernel has more than those above."""
    found = []
    for source in sorted(p for p in CSRC.iterdir() if p.suffix in (".cu", ".cuh")):
        for barrier in ("__syncthreads();", "__syncwarp();", "cooperative_groups::this_grid().sync();"):
            text = re.sub(r"//.*", "", source.read_text())
            found += [(source.name, barrier, i) for i in range(text.count(barrier))]
    assert sorted(found) == sorted([site[:3] for site in SITES] + SPARE)
