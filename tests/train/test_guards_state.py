"""A checkpoint holds all that the next step depends on, and no generator of random numbers is part of that."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.config import dump_config, load_config
from prism_fast.data.readers import read_tasks
from prism_fast.models.processor import Processor
from prism_fast.track.metrics import reproducible
from prism_fast.train import context, state
from prism_fast.train.checkpoint import CheckpointError, read_checkpoint
from prism_fast.train.pipeline import run_eval, run_stages
from prism_fast.train.record import RunRecord
from prism_fast.train.signals import Stopped, StopRequest
from tests.models.exports import assert_discriminator_export, assert_policy_export

STAGES = ("warmup", "align", "rlvr")


def _metrics(folder: Path, stages: tuple[str, ...]) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records if record["stage"] in stages]


def test_no_global_generator_decides_anything(finished, small_run, tmp_path, monkeypatch):
    """The stages behind SFT again, with Python's, NumPy's and PyTorch's generators in another state at every step."""
    steps = 0
    original = state.StageState.steps

    def begun(state, total, **options):
        nonlocal steps
        for step in original(state, total, **options):
            steps += 1
            random.seed(steps)
            np.random.seed(steps)
            torch.manual_seed(steps)
            yield step

    monkeypatch.setattr(state.StageState, "steps", begun)
    overrides = [f"model.policy={finished / 'export/sft'}", "stages=[warmup,align,rlvr]", "eval.limit=1"]
    config = load_config("digits", [*small_run, *overrides, f"out={tmp_path / 'run'}"])
    run_stages(config, Console(quiet=True))
    assert _metrics(tmp_path / "run", STAGES) == _metrics(finished, STAGES)
    assert steps > 5


def test_a_checkpoint_holds_what_the_next_step_depends_on(finished):
    """Weights and both moments of every parameter of every model, and everything else by name."""
    names = {p.name.rpartition("-")[0]: p for p in (finished / "checkpoints").iterdir()}
    checkpoint = read_checkpoint(names["rlvr"])
    tensors = load_file(checkpoint.folder("policy") / "engine.safetensors")
    assert tensors.pop("updates") > 0
    parameters = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    for name in parameters:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert tensors[f"{moment}.{name}"].shape == tensors[f"model.{name}"].shape
        assert tensors[f"step.{name}"].numel() == 1
    assert len(tensors) == 4 * len(parameters) > 100
    state = checkpoint.state
    assert set(state) == {
        "format", "config", "data", "stage", "step", "budgets", "order", "extra", "held", "metrics_bytes",
        "rollout_bytes", "ranks", "evaluation",
    }  # fmt: skip
    assert state["order"]["position"] > 0 and state["extra"] is not None
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert set(manifest) == {"policy/engine.safetensors", "state.json"}


def test_exports_of_a_run_compute_the_same_in_stock_transformers(finished, small_data):
    files = dict(item.removeprefix("data.").split("=", 1) for item in small_data)
    task = read_tasks(Path(files["eval"]), require_teacher=False)[0]
    prompt = Processor.from_pretrained(finished / "export/rlvr").encode_prompt(task.messages, task.images)
    assert_policy_export(finished / "export/rlvr", prompt)
    assert_discriminator_export(finished / "export/discriminator", prompt)


def test_a_stopped_evaluation_keeps_its_batches(finished, small_run, tmp_path, monkeypatch):
    overrides = [f"model.policy={finished / 'export/align'}", "eval.batch=4", "stages=[]"]
    whole, cut = (
        load_config("digits", [*small_run, *overrides, f"out={tmp_path / name}"]) for name in ("whole", "cut")
    )
    accuracy = run_eval(whole, Console(quiet=True))
    polls = 0
    poll = StopRequest.poll

    def stop_in_the_second_batch(stop, where, **joint):
        nonlocal polls
        if (tmp_path / "cut/evals/eval.chunks").read_bytes().count(b"\n") == 2:
            polls += 1
            if polls == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return poll(stop, where, **joint)

    monkeypatch.setattr(StopRequest, "poll", stop_in_the_second_batch)
    with pytest.raises(Stopped):
        run_eval(cut, Console(quiet=True))
    assert run_eval(cut, Console(quiet=True), resume=True) == accuracy
    name = "evals/eval.jsonl"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert _metrics(tmp_path / "cut", ("eval",)) == _metrics(tmp_path / "whole", ("eval",))
    assert not (tmp_path / "cut/evals/eval.chunks").exists()


def test_a_run_directory_has_one_user_and_its_record_is_not_shorter_than_its_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = load_config(str(folder / "config.yaml"), [f"out={folder}"])
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is at work in"):
        run_stages(config, Console(quiet=True), resume=True)
    os.close(handle)
    (folder / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl is shorter than when the checkpoint was saved"):
        run_stages(config, Console(quiet=True), resume=True)
    assert RunRecord(**json.loads((folder / "record.json").read_text())).completed[-1] == "rlvr"
    with pytest.raises(ValueError, match="not empty.*prism-fast resume"):
        run_stages(config, Console(quiet=True))


@pytest.mark.parametrize("kept", ["data/pairs.chunks", "evals/eval.chunks", "evals/eval.jsonl", "metrics.jsonl"])
def test_a_failed_run_with_finished_batches_stays(small_run, tmp_path, monkeypatch, kept):
    """Batches of answers are hours of work, and come before the first line of metrics."""
    folder = tmp_path / "run"
    config = load_config("digits", [*small_run, f"out={folder}"])

    def fails(*arguments) -> dict:
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_text("a batch\n")
        raise OSError("no space left")

    monkeypatch.setattr(context, "environment", fails)
    with pytest.raises(OSError, match="no space left"):
        run_stages(config, Console(quiet=True))
    assert (folder / kept).read_text() == "a batch\n"


def test_told_to_stop_before_the_first_step_nothing_stays(small_run, tmp_path, monkeypatch):
    config = load_config("digits", [*small_run, f"out={tmp_path / 'run'}"])
    monkeypatch.setattr(context, "environment", lambda *arguments: sys.exit(0))  # what a signal's handler does
    with pytest.raises(SystemExit):
        run_stages(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_digits_that_a_killed_run_had_half_written_are_removed(small_run, tmp_path):
    half = tmp_path / "run" / "data" / ".digits.999999999.partial"
    half.mkdir(parents=True)
    with pytest.raises(ValueError, match="not empty"):
        run_stages(load_config("digits", [*small_run, f"out={tmp_path / 'run'}"]), Console(quiet=True))
    assert not half.exists()


@pytest.mark.parametrize("last", [True, False], ids=["in a stage", "between stages"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("sft.batch=8", r"sft.batch=8 \(was 16\).*put it back"),
        ("rlvr.optimizer.lr=3.5e-4", r"rlvr.optimizer.lr=0.00035 \(was 0.0\d+\).*put it back"),
        ("threads=2", None),
    ],
)
def test_a_run_does_not_go_on_with_another_recipe(finished, tmp_path, edit, message, last):
    """Neither inside a stage, of which there is a checkpoint, nor where the next one begins anew."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "record.json").read_text())
    record["completed"].remove("rlvr")
    (folder / "record.json").write_text(json.dumps(record))
    if not last:
        for checkpoint in (folder / "checkpoints").glob("rlvr-*"):
            shutil.rmtree(checkpoint)
    config = load_config(str(folder / "config.yaml"), [f"out={folder}", edit])
    (folder / "config.yaml").write_text(dump_config(config))
    if message is None:
        run_stages(config, Console(quiet=True), resume=True)
        assert "rlvr" in json.loads((folder / "record.json").read_text())["completed"]
        return
    with pytest.raises(CheckpointError, match=f"config.yaml is not that of the run's beginning: {message}"):
        run_stages(config, Console(quiet=True), resume=True)
    if last:  # a record of an older version holds no configuration; the checkpoint does
        (folder / "record.json").write_text(json.dumps({k: v for k, v in record.items() if k != "config"}))
        with pytest.raises(CheckpointError, match=f"config.yaml is not that of rlvr-000002: {message}"):
            run_stages(config, Console(quiet=True), resume=True)
