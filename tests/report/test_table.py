from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from prism_fast.report.rundir import read_run
from prism_fast.report.statistics import accuracy_interval, paired_difference
from prism_fast.report.summary import RESAMPLES, SEED
from prism_fast.report.table import stage_table
from tests.report.synthetic import write_run


def text_of(path: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO(), color_system=None)
    console.print(stage_table(path))
    return console.export_text()


def cells(text: str, label: str) -> list[str]:
    """Cells of the row with this label, lines of a cell joined."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("│") and line.split("│")[1].strip() == label)
    rows = [[part.strip() for part in lines[start].split("│")[2:-1]]]
    for line in lines[start + 1 :]:
        if not line.startswith("│") or line.split("│")[1].strip():
            break
        rows.append([part.strip() for part in line.split("│")[2:-1]])
    return [" ".join(part for part in column if part) for column in zip(*rows, strict=True)]


def test_numbers_are_those_of_the_statistics(finished_run: Path) -> None:
    text = text_of(finished_run)
    run = read_run(finished_run)
    sft, rlvr = run.evals["sft"], run.evals["rlvr"]
    clusters = [item["cluster"] for item in sft]
    correct = {name: [item["correct"] for item in items] for name, items in (("sft", sft), ("rlvr", rlvr))}
    interval = accuracy_interval(correct["sft"], clusters)
    assert cells(text, "accuracy, %")[0] == (
        f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )
    gain = paired_difference(correct["rlvr"], correct["sft"], clusters, seed=SEED, resamples=RESAMPLES)
    mean, low, high = (100 * value for value in gain.interval)
    assert cells(text, "vs SFT")[4] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    assert cells(text, "vs SFT")[0] == "–" and cells(text, "vs continued")[:2] == ["–", "–"]
    sums = [item["correct"] for item in sft if item["kind"] == "sum"]
    assert cells(text, "sum")[0] == f"{100 * sum(sums) / len(sums):.1f}"
    assert cells(text, "updates") == ["40"] * 5 and cells(text, "wall time") == ["24.0 s"] * 5
    behind = text[text.index("behind SFT:") :]
    assert cells(behind, "updates") == ["–", "40", "40", "40", "80"]
    assert cells(behind, "rollouts") == ["–", "0", "10,240", "3,072", "13,312"]
    assert cells(behind, "time") == ["–", "20.0 s", "20.0 s", "44.0 s", "1 min 04 s"]


def test_fits_eighty_columns_without_cutting(finished_run: Path) -> None:
    text = text_of(finished_run)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    text = text_of(write_run(tmp_path / "half", stages=["sft"]))
    assert "RLVR" not in text and "vs" not in text and cells(text, "items") == ["240"]
    nothing = text_of(write_run(tmp_path / "none", stages=[]))
    assert "No stage of this run has been evaluated." in nothing and "intervals" not in nothing


def test_names_from_data_are_not_markup(run_dir: Path) -> None:
    for path in (run_dir / "evals").glob("*.jsonl"):
        items = [json.loads(line) | {"kind": "[red]s[/red]\x1b[2J\ud800"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert "[red]s[/red]\u241b[2J\ufffd" in text_of(run_dir, width=100)


def test_a_cut_evaluation_is_not_compared(run_dir: Path) -> None:
    path = run_dir / "evals" / "rlvr.jsonl"
    path.write_text(path.read_text()[:-30])
    text = text_of(run_dir, width=200)
    assert cells(text, "vs SFT")[4] == "–" and cells(text, "items")[4] == "239"
    assert "The evaluation of RLVR is not finished: 239 items so far." in text


def test_two_images_get_a_p_and_no_interval(run_dir: Path) -> None:
    """One item better in each of two images: +25 points, which the sign test gives p = 0.5."""
    for stage, right in (("sft", (0, 4)), ("rlvr", (0, 1, 4, 5))):
        path = run_dir / "evals" / f"{stage}.jsonl"
        items = [json.loads(line) for line in path.read_text().splitlines()][:8]
        items = [item | {"cluster": i // 4, "correct": int(i in right)} for i, item in enumerate(items)]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert cells(text_of(run_dir), "vs SFT")[4] == "+25.0 p = 0.500"
    low, high = (float(part) for part in cells(text_of(run_dir), "accuracy, %")[0][6:-1].split(","))
    assert low < 1 and high > 99
