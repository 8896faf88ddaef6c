"""Every Triton kernel compiles to machine code for the cards we name, without spilling registers. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is the compiler under test")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", "80", "90", "100"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills(compiled):
    assert [c for c in compiled if c["spills"]] == []


def test_every_kernel_on_every_card(compiled):
    seen = {(c["kernel"], c["arch"]) for c in compiled}
    assert seen == {("combine_kernel", a) for a in (80, 90, 100)} | {("matmul_kernel", a) for a in (90, 100)}


def test_product_uses_tensor_copies_and_matrix_units(compiled):
    products = [c for c in compiled if c["kernel"] == "matmul_kernel"]
    assert len(products) == 12  # three operand layouts × two output dtypes × two cards
    assert all(c["tma"] and (c["wgmma"] if c["arch"] == 90 else c["tcgen05"]) for c in products)


def test_row_count_does_not_recompile(compiled):
    """Four launches with other row and slice counts are one kernel per card."""
    assert sorted(c["arch"] for c in compiled if c["kernel"] == "combine_kernel") == [80, 90, 100]
