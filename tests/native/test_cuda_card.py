"""The CUDA kernels run without a card: the ops' own tests once more, on the processor of ``tests/support/cuda``."""

from __future__ import annotations

import shutil
import sys

import pytest

if not sys.platform.startswith("linux") or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)

from tests.support.cuda_card import build, passed, run, translated

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


# What each file has at least on a card: so that not all of it can fall out unseen.
@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("group_advantage", 20), ("pairwise_loss", 20), ("policy_loss", 50), ("route_experts", 30),
        ("selected_logprob", 50), ("repeated_calls", 8),
    ],
)  # fmt: skip
def test_the_ops_own_tests_pass(file, least):
    done = run(build(), f"tests/native/test_{file}.py")
    assert done.returncode == 0 and passed(done) >= least, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(2, 6))
def test_other_orders_of_the_threads_give_the_same(seed):
    """Three calls each in one process come in three orders."""
    done = run(build(), "tests/native/test_repeated_calls.py", PRISM_CARD_SEED=str(seed))
    assert done.returncode == 0 and passed(done) == 8, done.stdout + done.stderr


def test_translation():
    """Shared arrays and launches; each array of a file has a number of its own."""
    text = translated("__shared__ int a[2], b[n + 1][3];\nkernel<<<blocks, 4, 0, stream>>>(x...);\n__shared__ T c[1];")
    assert text == (
        "auto& a = processor::shared<int[2], 0>(); auto& b = processor::shared<int[n + 1][3], 1>();\n"
        "processor::launch(kernel, blocks, 4, x...);\nauto& c = processor::shared<T[1], 2>();"
    )
