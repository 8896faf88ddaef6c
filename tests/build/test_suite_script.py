"""The GPU suite's script parses, names its sections, keeps its time budget and flushes results. Runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_suite.sh"


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=100)


def test_it_parses():
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sections_and_caps():
    done = suite("--list")
    caps = {name: int(seconds) for name, seconds in map(str.split, done.stdout.splitlines())}
    assert list(caps) == ["build", "tests", "ops", "attention", "step", "digits"]
    assert caps["digits"] <= 120 and sum(caps.values()) < 10 * 60 - 30  # the rest is start-up and killing what is cut


@pytest.mark.parametrize("arguments", [("--only", "nothing"), ("--only",), ("--sections",)])
def test_wrong_arguments_are_refused(arguments):
    done = suite(*arguments)
    assert done.returncode == 2 and "gpu_suite:" in done.stderr


def test_a_failing_section_fails_the_suite_and_is_flushed(tmp_path):
    done = suite("--only", "step", OUT=str(tmp_path), BENCH_STEP_ARGS="--no-such-option")
    assert done.returncode == 1
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["status"] == "failed" and result["exit_code"] == 2 and result["data"] is None
    assert result["machine"]["torch"] and "no-such-option" in (tmp_path / "suite.log").read_text()
    assert (ROOT / "bench" / "UNMEASURED.md").read_text() in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].split()[:2] == ["step", "failed"]  # the short table stands last
    assert not list(tmp_path.glob("record-*"))


def test_status_of_a_section_that_ran_out_of_time(tmp_path):
    out, data = tmp_path / "x.json", tmp_path / "data.json"
    data.write_text('{"rows": [1]}')
    command = [sys.executable, str(ROOT / "bench" / "flush.py"), "--section", "x", "--exit-code", "124", "--cap", "5"]
    subprocess.run([*command, "--started", "0", "--data", str(data), "--out", str(out)], check=True)
    result = json.loads(out.read_text())
    assert result["status"] == "cut" and result["data"] == {"rows": [1]}


def test_the_op_section_runs_without_a_gpu_and_its_table_stands_last(tmp_path):
    arguments = "--op pairwise --provider eager --provider prism_fast"
    done = suite("--cpu", "--only", "ops", OUT=str(tmp_path), BENCH_OPS_ARGS=arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "ops.json").read_text())
    assert result["status"] == "ok" and {row["op"] for row in result["data"]["rows"]} == {"pairwise_loss"}
    section, line = done.stdout.rstrip().splitlines()[-2:]
    assert section.split()[:2] == ["ops", "ok"] and line.split()[0] == "pairwise_loss" and " x eager " in line


def test_what_was_measured_on_a_card_is_kept_as_a_record(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import flush

    monkeypatch.setattr(flush, "machine", lambda: {"card": "NVIDIA H200", "date": "2030-01-02"})
    (tmp_path / "data.json").write_text('{"rows": []}')
    out, data = tmp_path / "step.json", tmp_path / "data.json"
    command = ["flush", "--section", "step", "--exit-code", "0", "--cap", "5", "--started", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(data), "--out", str(out)])
    flush.main()
    assert (tmp_path / "record-step-nvidia_h200-2030-01-02.json").read_text() == out.read_text()


def test_unmeasured_names_every_section():
    text = (ROOT / "bench" / "UNMEASURED.md").read_text()
    records = (ROOT / "bench" / "results").glob("record-*.json")
    measured = {p.name.split("-")[1] for p in records if "-cpu-" not in p.name}
    for section in {"tests", "ops", "attention", "step", "digits"} - measured:
        assert f"--only {section}" in text, section
