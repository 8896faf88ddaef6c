"""`bench compare`: what is flagged, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prism_fast.bench.command import app
from prism_fast.bench.compare.results import compare, table
from prism_fast.bench.ops.op import Row
from prism_fast.bench.ops.providers import providers

STEP = Path(__file__).resolve().parents[2] / "bench" / "results" / "record-step-cpu-2026-11-22.json"
MACHINE = {"card": None, "processor": "p", "threads": 2, "torch": "2.13.0", "commit": "a", "load": 0.1}


def row(**changes) -> dict:
    fixed = dict(op="f", provider="eager", mode="full", shape="4x4", dtype="float32", status="ok", note="")
    measured = dict(ms_p50=10.0, peak_mib=100.0, errors={"result 0": 1e-6})
    return fixed | measured | changes


def files(tmp_path, *records) -> list[str]:
    paths = []
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(record))
        paths.append(path)
    return paths


def ops(*rows, **machine) -> dict:
    return {"machine": MACHINE | machine, "size": "cpu", "rows": list(rows)}


@pytest.mark.parametrize(
    "after,verdict,bad",
    [(10.4, "ok", False), (10.6, "slower", True), (9.4, "faster", False), (9.6, "ok", False)],
)
def test_a_time_that_grew_by_more_than_a_twentieth_is_flagged(tmp_path, after, verdict, bad):
    before, later = files(tmp_path, ops(row()), ops(row(ms_p50=after)))
    lines, remarks = compare(before, later)
    assert [line.verdict for line in lines] == [verdict, "ok"] and remarks == []
    done = CliRunner().invoke(app, ["compare", str(before), str(later)])
    assert done.exit_code == bad and (f"{verdict} " in done.output) == (verdict != "ok")


def test_a_peak_that_grew_is_flagged(tmp_path):
    lines, _ = compare(*files(tmp_path, ops(row()), ops(row(peak_mib=106.0))))
    assert [line.verdict for line in lines] == ["ok", "larger"] and lines[1].bad
    assert "+6.0 %" in table(lines)[0] and table(lines)[-1] == "1 of 2 within 5 %"


@pytest.mark.parametrize(
    "change,note",
    [
        (dict(status="wrong", note="error above 1e-4"), "status ok and wrong: error above 1e-4"),
        (dict(status="absent", note="no module"), "status ok and absent"),
        (dict(errors={"result 0": 1e-5}), "another result: error of result 0 1.0e-06 and 1.0e-05"),
        (dict(errors={"result 1": 1e-6}), "another result"),
        (dict(errors={"result 0": float("nan")}), "another result"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_results_that_differ_are_not_compared(tmp_path, change, note, turned):
    records = [ops(row()), ops(row(**change))]
    lines, _ = compare(*files(tmp_path, *(records[::-1] if turned else records)))
    assert [line.verdict for line in lines] == ["not compared"] and lines[0].bad
    assert turned or note in lines[0].note
    assert compare(*files(tmp_path, ops(row()), ops(row(errors={"result 0": 1.9e-6}))))[0][0].verdict == "ok"


@pytest.mark.parametrize(
    "other,message",
    [
        (ops(row(), processor="q"), "different machines: processor 'p' and 'q'"),
        (ops(row(), card="H200"), "different machines: card None and 'H200'"),
        (ops(row(), threads=4), "different machines: threads 2 and 4"),
        (ops(row()) | {"size": "small"}, "differ in size: 'cpu' and 'small'"),
        (ops(row(op="g")), "no measurement in common"),
        (ops(), "is no result of"),
        ([], "is no result of"),
    ],
)
def test_files_that_mean_something_else_are_refused(tmp_path, other, message):
    paths = files(tmp_path, ops(row()), other)
    done = CliRunner().invoke(app, ["compare", *map(str, paths)])
    assert done.exit_code == 2
    with pytest.raises(ValueError, match=message):
        compare(*paths)


def test_versions_load_and_missing_lines_are_told(tmp_path):
    old = ops(row(), row(mode="forward"))
    _, remarks = compare(*files(tmp_path, old, ops(row(), torch="2.14.0", commit="b", load=3.0)))
    assert remarks[:2] == ["torch: 2.13.0 and 2.14.0", "commit: a and b"]
    assert remarks[2].startswith("load 0.1 and 3.0") and "only in" in remarks[3] and "forward" in remarks[3]


def test_steps_are_compared_by_phase_and_only_for_equal_work(tmp_path):
    record = json.loads(STEP.read_text())
    slow, other = copy.deepcopy(record), copy.deepcopy(record)
    slow["rows"][2]["ms_p50"]["policy"] *= 1.5
    lines, _ = compare(*files(tmp_path, record, slow))
    assert [line.name.split(", ")[-1] for line in lines if line.bad] == ["policy"]
    other["rows"][0]["counts"]["score"]["tokens_no_grad"] += 1
    lines, _ = compare(*files(tmp_path, record, {"section": "step", "data": other}))
    assert [line.verdict for line in lines if line.bad] == ["not compared"]
    assert "other work: score" in next(line.note for line in lines if line.bad)
    with pytest.raises(ValueError, match="is of bench step"):
        compare(*files(tmp_path, record, ops(row())))


def test_the_table_of_providers_names_the_absent():
    rows = [
        Row("f", "eager", "full", "4", "float32", "ok"),
        Row("f", "rival", "full", "4", "float32", "absent", "rival: not installed"),
        Row("g", "rival", "full", "4", "float32", "unsupported", "needs CUDA"),
        Row("g", "eager", "full", "4", "float32", "ok"),
    ]
    assert providers(rows)[1:] == [
        "eager     2 of 2",
        "rival     0 of 2; absent: rival: not installed; unsupported: needs CUDA",
    ]
