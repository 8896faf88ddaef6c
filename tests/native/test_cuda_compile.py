"""Every CUDA kernel compiles for every shipped architecture without a warning and without a spilled register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")
ARCHS = ("80", "90a", "100")


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", sorted(p.name for p in CSRC.glob("*.cu")))
def test_no_warning_and_no_spill(source, tmp_path):
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    command = [NVCC, "-O3", "-std=c++17", "-Xptxas", "-v", *codes, "-c", str(CSRC / source), "-o", str(tmp_path / "k.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and not re.search(r"\bwarning\b", report, re.IGNORECASE), report
    kernels = len(re.findall(r"Compiling entry function", report))
    assert len(re.findall(r"0 bytes spill stores, 0 bytes spill loads", report)) == len(re.findall("spill stores", report))
    print(source, kernels, "kernels, registers", sorted(int(r) for r in re.findall(r"Used (\d+) registers", report)))
