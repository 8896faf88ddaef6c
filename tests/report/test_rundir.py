from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_fast.report.rundir import Series, read_rollouts, read_run
from tests.report.synthetic import STAGES, append_lines, write_frames, write_run


def append_text(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_reads_what_a_run_wrote(finished_run: Path) -> None:
    run = read_run(finished_run)
    assert run.problems == []
    assert run.complete and run.planned == tuple(STAGES)
    assert run.evaluated == ("sft", "sft_continued", "rlvr_direct", "align", "rlvr")
    assert run.rollout_stages == ("rlvr_direct", "align", "rlvr")
    assert run.finished == dict.fromkeys(STAGES, 24.0)
    assert run.environment["torch"] == "2.13.0"
    assert [item["uid"] for item in run.evals["sft"]] == sorted(item["uid"] for item in run.evals["sft"])
    loss = run.series("sft", "sft/loss")
    assert loss is not None and loss.steps == tuple(range(1, 41))
    assert run.series("sft", "sft/val_loss").steps == (8, 16, 24, 32, 40)
    assert run.series("sft", "policy/loss") is None and run.series("unknown", "sft/loss") is None
    assert "disc/loss" in run.keys("align") and "step" not in run.keys("align")


def test_a_partial_last_line_is_left_out_and_told(run_dir: Path) -> None:
    append_text(run_dir / "metrics.jsonl", '{"stage": "rlvr", "step": 41, "policy/lo')
    run = read_run(run_dir)
    assert run.series("rlvr", "policy/loss").steps[-1] == 40
    assert len(run.problems) == 1 and "metrics.jsonl ends inside line" in run.problems[0]


def test_a_line_cut_before_a_resume_is_left_out_and_told(run_dir: Path) -> None:
    append_text(run_dir / "metrics.jsonl", '{"stage": "rlvr", "st\n{"stage": "rlvr", "step": 41, "policy/loss": 0.5}\n')
    run = read_run(run_dir)
    assert run.series("rlvr", "policy/loss").steps[-1] == 41
    assert [problem for problem in run.problems if "is not JSON" in problem]


def test_a_repeated_step_counts_once_with_its_later_values(tmp_path: Path) -> None:
    first = [{"stage": "sft", "step": step, "sft/loss": float(step)} for step in (1, 2, 3)]
    later = [{"stage": "sft", "step": step, "sft/loss": 10.0 * step} for step in (3, 4)]
    extra = [{"stage": "sft", "step": 4, "sft/val_loss": 7.0}]
    append_lines(tmp_path / "metrics.jsonl", [*first, *later, *extra])
    run = read_run(tmp_path)
    assert run.series("sft", "sft/loss") == Series((1, 2, 3, 4), (1.0, 2.0, 30.0, 40.0))
    assert run.series("sft", "sft/val_loss") == Series((4,), (7.0,))
    assert any("1 lines of metrics.jsonl repeat a step" in problem for problem in run.problems)


def test_texts_among_metrics_are_no_series(tmp_path: Path) -> None:
    append_lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": 1, "sft/loss": 1, "sft/phase": "decay"}])
    assert read_run(tmp_path).keys("sft") == ["sft/loss"]
    append_lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": 2, "sft/loss": [1]}])
    with pytest.raises(ValueError, match="'sft/loss' of sft step 2 is \\[1\\], not a number"):
        read_run(tmp_path)


@pytest.mark.parametrize("done", [[], ["sft"], ["sft", "sft_continued", "warmup", "align"]])
def test_unfinished_runs_are_not_complete(tmp_path: Path, done: list[str]) -> None:
    run = read_run(write_run(tmp_path / "run", stages=done))
    assert not run.complete
    assert run.evaluated == tuple(stage for stage in done if stage != "warmup")
    assert set(run.finished) == set(done)


def test_missing_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: digits\n")
    told = " ".join(read_run(tmp_path).problems)
    assert "environment.json is missing" in told and "metrics.jsonl is missing" in told
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    assert run.config is None and any("config.yaml is missing" in problem for problem in run.problems)


def test_refuses_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run directory at"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither config.yaml nor metrics.jsonl"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_run(tmp_path)


def test_an_evaluation_cut_at_its_end_is_told_and_one_broken_inside_is_refused(run_dir: Path) -> None:
    path = run_dir / "evals" / "rlvr.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    run = read_run(run_dir)
    assert run.incomplete == {"rlvr"} and len(run.evals["rlvr"]) == len(run.evals["sft"]) - 1
    lines = whole.splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"rlvr\.jsonl line 2 is not JSON"):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uid": "eval-00000"}, "uid 'eval-00000' occurs twice"),
        ({"correct": 2}, "must be 0 or 1"),
        ({"correct": None}, "must be 0 or 1"),
        ({"cluster": ...}, "no field 'cluster'"),
    ],
)
def test_refuses_a_wrong_evaluation(run_dir: Path, change: dict, message: str) -> None:
    path = run_dir / "evals" / "sft.jsonl"
    item = json.loads(path.read_text().splitlines()[0]) | {"uid": "another"} | change
    append_lines(path, [{key: value for key, value in item.items() if value is not ...}])
    with pytest.raises(ValueError, match=message):
        read_run(run_dir)


def records(count: int) -> list[dict]:
    return [{"step": i, "group": 0, "text": f"answer {i} " + "long " * 50} for i in range(count)]


def test_rollouts_are_read_across_frames(tmp_path: Path) -> None:
    path = tmp_path / "align.jsonl.zst"
    write_frames(path, records(50), per_frame=7)
    problems: list[str] = []
    assert [record["step"] for record in read_rollouts(path, problems)] == list(range(50))
    assert problems == []


def test_a_cut_frame_keeps_what_lies_before_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "align.jsonl.zst"
    write_frames(path, records(50), per_frame=10)
    path.write_bytes(path.read_bytes()[:-12])
    problems: list[str] = []
    steps = [record["step"] for record in read_rollouts(path, problems)]
    assert steps[:40] == list(range(40)) and len(steps) < 50
    assert any("ends inside a compressed frame" in problem for problem in problems)


def test_a_damaged_frame_ends_the_reading_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "align.jsonl.zst"
    write_frames(path, records(5), per_frame=5)
    with path.open("ab") as file:
        file.write(b"this is no frame at all")
    problems: list[str] = []
    assert len(list(read_rollouts(path, problems))) == 5
    assert any("is damaged" in problem for problem in problems)


def test_image_names_cannot_leave_the_folder(finished_run: Path) -> None:
    run = read_run(finished_run)
    for name in ("../../config", "0" * 63, "G" * 64, "A" * 64, None):
        with pytest.raises(ValueError, match="not a SHA-256"):
            run.image(name)
    assert run.image("0" * 64) is None
