"""The benchmark of a shared-out vocabulary runs on two processes and notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from prism_fast.bench import vocab_ranks
from prism_fast.bench.ops import heads


def test_two_processes_agree_with_float64(tmp_path):
    out = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "prism_fast.bench.vocab_ranks", "--device", "cpu", "--rounds", "1"]
    command += ["--shape", "24x8x41", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["status"] == "ok" and result["network"] == "gloo" and result["ranks"] == 2
    assert set(result["ms_p50"]) == set(vocab_ranks.COLUMNS) and all(ms > 0 for ms in result["ms_p50"].values())
    assert (
        set(result["errors"]) == {"logp", "entropy", "d_hidden", "d_weight"} and max(result["errors"].values()) < 1e-5
    )


def test_errors_name_what_is_off():
    x = heads.inputs((24, 8, 41), torch.float32, "cpu")
    mine = slice(20, 41)
    found = vocab_ranks.both(x["hidden"], x["weight"], x["target"], (x["upstream"], x["upstream_entropy"]))
    found = [*found[:3], found[3][mine]]
    assert max(vocab_ranks.errors(found, x, mine).values()) < 1e-5
    found[2] = found[2] * 1.01
    off = vocab_ranks.errors(found, x, mine)
    assert off["d_hidden"] == pytest.approx(0.01, rel=1e-2) and max(off["logp"], off["entropy"], off["d_weight"]) < 1e-5


@pytest.mark.parametrize("arguments", [["--ranks", "1"], ["--shape", "8x8"], ["--device", "cuda", "--ranks", "4096"]])
def test_wrong_arguments_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vocab_ranks", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        vocab_ranks.main()
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
