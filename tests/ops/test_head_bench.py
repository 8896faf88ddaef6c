"""The memory and time program of the head runs, checks its results, and finds the order of memory it is about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "linear_logprob_bench.py"


def bench(tmp_path: Path, *arguments: str, timeout: float) -> list[dict]:
    out = tmp_path / "out.json"
    command = [sys.executable, str(PROGRAM), "--json", str(out), *arguments]
    env = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["rows"]


def test_small_shape(tmp_path):
    rows = bench(tmp_path, "--shape", "256x64x1024", "--rounds", "1", "--no-memory", timeout=60)
    assert len(rows) == 6 and all(row["status"] == "ok" and row["ms_p50"] > 0 for row in rows)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_goals_on_a_cpu(tmp_path):
    """A quarter of the memory of materialised logits, at 1.35 (four passes) and 1.1 (three passes) of their time."""
    bench(tmp_path, "--rounds", "5", "--check", timeout=890)
