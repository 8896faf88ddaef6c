"""Runs that are killed or asked to stop end with the metrics of a run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_fast.track.metrics import WALL_CLOCK, reproducible


def _metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records]


def _start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "prism_fast.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _wait_for(folder: Path, stage: str, process: subprocess.Popen) -> None:
    """Until the stage has written its first metrics line."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f'"stage": "{stage}"' in path.read_text():
            return
        time.sleep(0.05)


def _assert_equal(folder: Path, finished: Path) -> None:
    assert _metrics(folder) == _metrics(finished)
    for name in ("sft", "rlvr_direct", "align", "rlvr"):
        assert (folder / "evals" / f"{name}.jsonl").read_bytes() == (finished / "evals" / f"{name}.jsonl").read_bytes()
    for stage in ("rlvr_direct", "align", "rlvr"):
        name = f"{stage}.jsonl.zst"
        assert (folder / "rollouts" / name).read_bytes() == (finished / "rollouts" / name).read_bytes()
    _assert_curves(folder, finished)


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as Python programs read TensorBoard's files."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if not any(name in tag for name in WALL_CLOCK)
    }


def _assert_curves(folder: Path, finished: Path) -> None:
    curves, training = _curves(folder), {}
    assert curves == _curves(finished)
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{tag} has repeated or disordered steps"
        parts = tag.split("/")
        assert parts[0] not in parts[1:], f"{tag} is doubled"
        training[parts[0]] = max(training.get(parts[0], 0), steps[-1])
    evaluated = [step for step, _ in curves["eval/accuracy"]]
    assert evaluated == [training[stage] for stage in ("sft", "sft_continued", "rlvr_direct", "align", "rlvr")]
    assert 0 < evaluated[0] and evaluated == sorted(set(evaluated))


@pytest.mark.timeout(600)
def test_killed_and_stopped_in_several_stages_a_run_ends_the_same(finished, small_run, tmp_path):
    folder = tmp_path / "run"
    arguments = ["run", "digits", f"out={folder}", *small_run, "checkpoint_every=7"]
    for stage, how in (("sft", signal.SIGKILL), ("warmup", signal.SIGTERM), ("align", signal.SIGKILL)):
        process = _start(arguments)
        _wait_for(folder, stage, process)
        process.send_signal(how)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == (0 if how == signal.SIGTERM else -how), shown
        if how == signal.SIGTERM:
            assert "prism-fast resume" in shown
        arguments = ["resume", str(folder)]
    process = _start(arguments)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    _assert_equal(folder, finished)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments_a_run_ends_the_same(finished, small_run, tmp_path):
    """Fifteen kills at random lines of the metrics, which lie in all stages, and five at random times after a start."""
    rng, folder = random.Random(5), tmp_path / "run"
    lines = sorted(rng.randrange(1, len(_metrics(finished))) for _ in range(15))
    moments: list[int | None] = [*lines, *[None] * 5]
    rng.shuffle(moments)
    targets = iter(lines)
    arguments = ["run", "digits", f"out={folder}", *small_run, "checkpoint_every=7"]
    for moment in moments:
        process = _start(arguments)
        if moment is None:
            time.sleep(rng.uniform(0.0, 15.0))
        else:
            _wait_for_lines(folder, next(targets), process)
            time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        shown, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), shown
        if (folder / "config.yaml").exists():
            arguments = ["resume", str(folder)]
        else:
            assert not folder.exists() or not list(folder.glob("[!.]*")), (
                "a folder without a configuration holds nothing"
            )
    process = _start(arguments)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    _assert_equal(folder, finished)


def _wait_for_lines(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until the metrics have so many lines."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
