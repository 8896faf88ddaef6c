"""Traces of some steps, which change no number."""

from __future__ import annotations

import gzip
import json

from typer.testing import CliRunner

from prism_fast.cli import app
from prism_fast.config import load_config
from prism_fast.track.metrics import reproducible
from tests.train.conftest import run_small


def test_a_trace_of_the_steps_behind_the_first(small_run, tmp_path):
    settings = [*small_run, "stages=[sft]", "data.eval=null", "sft.ends=updates", "sft.max_updates=4"]
    plain, traced = run_small(tmp_path / "plain", settings), tmp_path / "traced"
    found = CliRunner().invoke(app, ["sft", "digits", "--profile", "2", *settings, f"out={traced}"])
    assert found.exit_code == 0, found.output
    (file,) = (traced / "profile").iterdir()
    assert file.name == "sft-000003.json.gz"
    names = {event.get("name") for event in json.loads(gzip.open(file).read())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (plain, traced)]
    first, second = ([reproducible(json.loads(line)) for line in of] for of in lines)
    assert first == second and load_config(str(traced / "config.yaml")).profile == 2
