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


def compile_for(*arguments: str, cache: Path, timeout: float) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", *arguments]
    env |= {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return compile_for("80", "90", "100", cache=tmp_path_factory.mktemp("triton"), timeout=110)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_no_shipped_tile_spills(arch, tmp_path):
    found = compile_for(arch, "--shipped", cache=tmp_path, timeout=590)
    assert [c for c in found if c["spills"]] == []
    # Eight tiles, some of them shared; each in two forms: training, and statistics alone.
    scores = [c for c in found if c["kernel"] == "scores_kernel"]
    assert len(scores) >= 8
    unit = {"80": None, "90": "wgmma", "100": "tcgen05"}[arch]
    assert unit is None or any(c[unit] and c["tma"] for c in scores)
    experts = ("up_kernel", "slot_rows_kernel", "slot_columns_kernel")
    for kernel in experts:
        forms = [c for c in found if c["kernel"] == kernel]
        assert len(forms) >= 4  # bfloat16 and float32, weights in either orientation
        assert unit is None or any(c[unit] for c in forms)
    passes = {"gather_rows", "swiglu", "swiglu_gradient", "combine_rows", "clear_idle"}
    assert {c["kernel"] for c in found} >= {f"{name}_kernel" for name in passes}


def test_nothing_spills(compiled):
    assert [c for c in compiled if c["spills"]] == []


def test_every_kernel_on_every_card(compiled):
    seen = {(c["kernel"], c["arch"]) for c in compiled}
    wanted = {("combine_kernel", a) for a in (80, 90, 100)}
    assert seen == wanted | {(k, 90) for k in ("scores_kernel", "gradient_kernel")}


def test_row_count_does_not_recompile(compiled):
    """Launches with other row and slice counts are one kernel per card and form."""
    for kernel in ("scores_kernel", "gradient_kernel"):  # training and statistics; with entropy and without
        assert sum(c["kernel"] == kernel for c in compiled) == 2
    assert sorted(c["arch"] for c in compiled if c["kernel"] == "combine_kernel") == [80, 90, 100]
