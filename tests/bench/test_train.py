"""The benchmark of an update beside TRL's: the columns compute the same, one that does not is named, the file has its
columns."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from typer.testing import CliRunner

from prism_fast.bench.command import app
from prism_fast.bench.compare.results import compare
from prism_fast.bench.ops.op import Absent
from prism_fast.bench.step.measure import TOLERANCE
from prism_fast.bench.step.work import Shape, draw_weights, widths
from prism_fast.bench.train import columns, measure
from prism_fast.bench.train.columns import FUSED, OURS, TRL
from prism_fast.bench.train.measure import STATUSES, Row
from prism_fast.bench.train.run import table

SHAPE = Shape(prompt=21, response=10, teacher=10, rollouts=3)
trl = pytest.importorskip("trl", reason="TRL is not installed (`make install` brings it)")


def measured(rounds: int = 0) -> dict[str, Row]:
    sizes = widths(None)
    weights = draw_weights(sizes, "cpu")
    rows = measure.measure(SHAPE, sizes, weights, device="cpu", dtype=torch.float32, rounds=rounds)
    return {row.column: row for row in rows}


def test_the_command_times_columns_that_compute_the_same(tmp_path):
    path = tmp_path / "train.json"
    sizes = ["--prompt", "21", "--response", "10", "--rollouts", "3", "--rounds", "2"]
    done = CliRunner().invoke(app, ["train", "--device", "cpu", *sizes, "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = {row["column"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [TRL, FUSED, OURS] and set(rows[TRL]) == {field.name for field in fields(Row)}
    assert rows[TRL]["errors"] == {"loss": 0.0, "d_policy": 0.0} and rows[TRL]["of_trl"] == 1.0
    for row in rows.values():
        assert row["status"] == "ok" and row["runs"] == 2 and row["column"] in done.output
        assert max(row["errors"].values()) < 1e-5 and row["loss"] == pytest.approx(rows[TRL]["loss"], rel=1e-5)
        seconds = SHAPE.rollouts * SHAPE.response / row["response_tokens_per_second"]
        assert seconds == pytest.approx(row["ms_p50"] / 1e3)
    assert rows[OURS]["errors"]["d_policy"] > 0
    lines, _ = compare(path, path)
    assert lines and {line.verdict for line in lines} == {"ok"}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_column_that_computes_something_else_is_wrong_and_not_timed(what, monkeypatch):
    update = columns.Ours.update

    def other(self) -> None:
        if what == "gradient":
            self.batch.advantage.mul_(1.01)
        update(self)
        if what == "loss":
            self.loss += 2 * TOLERANCE

    monkeypatch.setattr(columns.Ours, "update", other)
    row = measured(rounds=1)[OURS]
    assert row.status == "wrong" and row.runs == 0 and row.ms_p50 is None
    assert row.note.startswith("loss" if what == "loss" else "d_policy")
    assert "wrong" in table([row])[1]


def test_without_trl_its_columns_are_absent(monkeypatch):
    def missing(*_):
        raise Absent("trl: no module named 'trl'")

    monkeypatch.setattr(columns, "package", missing)
    rows = measured(rounds=1)
    assert [rows[name].status for name in (TRL, FUSED, OURS)] == ["absent", "absent", "ok"]
    assert rows[OURS].of_trl is None and rows[OURS].runs == 1 and {row.status for row in rows.values()} <= set(STATUSES)
    assert "absent: trl" in table(list(rows.values()))[1]
