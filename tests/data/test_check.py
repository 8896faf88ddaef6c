from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.data.check import check_file
from prism_fast.data.parsing import Settings, Wanted

PLAIN = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
TURNS = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
PAIR = {"prompt": "x", "teacher_caption": "a", "student_caption": "b", "teacher_cot": "c", "student_cot": "d"}


def test_all_problems_at_once(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    names = ["good.png", "bad.png", "missing.png", "good.png"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": TURNS, "images": [name]} for name in names] + [{"messages": TURNS}]))
    findings = check_file(path)
    assert (findings.form, findings.samples) == ("demonstrations", 2)
    assert [str(p).split(":")[0].split(", ")[-1] for p in findings.problems] == ["row 2", "row 4", "row 1"]


@pytest.mark.parametrize(
    ("name", "lines", "form", "samples", "problems"),
    [
        ("a.jsonl", [PAIR, {"prompt": "x"}], "pairs", 1, 1),
        ("b.jsonl", [{"messages": TURNS}, {"messages": PLAIN}], "demonstrations", 1, 1),
        ("c.jsonl", ["no object"], "unknown", 0, 1),
        ("d.json", [], "unknown", 0, 1),
        ("e.csv", [], "unknown", 0, 1),
    ],
)
def test_forms(tmp_path, name, lines, form, samples, problems):
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    findings = check_file(tmp_path / name)
    assert (findings.form, findings.samples, len(findings.problems)) == (form, samples, problems)


def test_parquet_and_missing_files(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "x"}],
        "data_source": "mm_gad",
        "reward_model": {"ground_truth": "1"},
        "teacher_caption": "a",
    }
    pq.write_table(pa.Table.from_pylist([row, {**row, "data_source": ""}]), tmp_path / "a.parquet")
    findings = check_file(tmp_path / "a.parquet")
    assert (findings.form, findings.samples, len(findings.problems)) == ("tasks", 1, 1)
    (problem,) = check_file(tmp_path / "a.parquet", settings=Settings(Wanted(require_teacher=True))).problems
    assert "field 'teacher_response': the column is missing" in str(problem)
    for name in ("none.parquet", "none.json", "none.jsonl"):
        (problem,) = check_file(tmp_path / name).problems
        assert "does not exist" in str(problem)
