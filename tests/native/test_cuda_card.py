"""The CUDA kernels run without a card: the ops' own tests once more, on the processor of ``tests/support/cuda``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prism_fast.ops import native

ROOT = Path(__file__).resolve().parents[2]

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)
if not sys.platform.startswith("linux") or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)

from tests.support.cuda_card import build, translated

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def run(module: Path, *what: str, **settings: str) -> subprocess.CompletedProcess:
    """Tests ``what`` in a process of their own, whose compiled module is ``module``."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.cuda_card", "-p", "no:cacheprovider", "-q", "-x"]
    if "LD_PRELOAD" in settings and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants its addresses where older kernels put them
    environment = os.environ | {"PRISM_CARD_MODULE": str(module), "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(
        [*command, "-o", "timeout=1500", *what], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def passed(done: subprocess.CompletedProcess) -> int:
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


# What each file has at least on a card: so that not all of it can fall out unseen.
@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("group_advantage", 20), ("pairwise_loss", 20), ("policy_loss", 50), ("route_experts", 30),
        ("selected_logprob", 50), ("repeated_calls", 7),
    ],
)  # fmt: skip
def test_the_ops_own_tests_pass(file, least):
    done = run(build(), f"tests/native/test_{file}.py")
    assert done.returncode == 0 and passed(done) >= least, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(2, 6))
def test_other_orders_of_the_threads_give_the_same(seed):
    """Five calls each in one process already come in five orders."""
    done = run(build(), "tests/native/test_repeated_calls.py", PRISM_CARD_SEED=str(seed))
    assert done.returncode == 0 and passed(done) == 7, done.stdout + done.stderr


def test_translation():
    """Shared arrays and launches; each array of a file has a number of its own."""
    text = translated("__shared__ int a[2], b[n + 1][3];\nkernel<<<blocks, 4, 0, stream>>>(x...);\n__shared__ T c[1];")
    assert text == (
        "auto& a = processor::shared<int[2], 0>(); auto& b = processor::shared<int[n + 1][3], 1>();\n"
        "processor::launch(kernel, blocks, 4, x...);\nauto& c = processor::shared<T[1], 2>();"
    )
