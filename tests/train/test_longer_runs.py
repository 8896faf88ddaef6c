"""A run that gets more steps as it goes on is the run that had them from its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.config import dump_config, load_config
from prism_fast.track.metrics import reproducible
from prism_fast.train.checkpoint import CheckpointError
from prism_fast.train.pipeline import run_stages
from prism_fast.train.record import refuse_changes
from tests.train.conftest import run_small


def lines(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records if record["stage"] != "stage"]


@pytest.mark.timeout(600)
def test_more_steps_of_a_complete_stage(small_run, finished, tmp_path):
    start = finished / "export" / "sft"
    settings = [*small_run, "stages=[rlvr]", "eval.limit=4", f"model.policy={start}", "rlvr.optimizer.lr=0.002"]
    settings += ["rlvr.loss_terms.kl_coef=0.1"]  # its reference is where the stage began, not where it was complete
    whole = run_small(tmp_path / "whole", [*settings, "rlvr.steps=4"])
    short = run_small(tmp_path / "short", [*settings, "rlvr.steps=2"])
    config = load_config(str(short / "config.yaml"), [f"out={short}", "rlvr.steps=4"])
    run_stages(config, Console(quiet=True), resume=True)
    assert lines(short) == lines(whole) and len([r for r in lines(short) if r["stage"] == "rlvr"]) == 4
    again, first = (load_file(run / "export" / "rlvr" / "model.safetensors") for run in (short, whole))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert load_config(str(short / "config.yaml")).rlvr.steps == 4
    with pytest.raises(CheckpointError, match=r"rlvr\.steps=3 \(was 4\)"):
        config = load_config(str(short / "config.yaml"), [f"out={short}", "rlvr.steps=3"])
        run_stages(config, Console(quiet=True), resume=True)
    record = json.loads((short / "record.json").read_text())
    (short / "record.json").write_text(json.dumps(record | {"completed": ["align", "rlvr"], "began": {"align": []}}))
    config = load_config(str(short / "config.yaml"), [f"out={short}", "align.steps=5"])
    with pytest.raises(CheckpointError, match=r"align\.steps cannot be raised: align is complete, and a later stage"):
        run_stages(config, Console(quiet=True), resume=True)


@pytest.mark.parametrize(
    ("before", "key", "reason"),
    [
        (["stages=[rlvr]", "rlvr.optimizer.schedule=cosine"], "rlvr.steps", "rlvr.optimizer.schedule=cosine follows"),
        (["stages=[rlvr]", "rlvr.optimizer.warmup_share=0.1"], "rlvr.steps", "rlvr.optimizer.warmup_share=0.1"),
        (["stages=[rlvr]", "rlvr.epochs=1"], "rlvr.steps", "rlvr.epochs=1.0 is its length"),
        (
            ["stages=[align]", "align.discriminator.optimizer.schedule=linear"],
            "align.steps",
            "align.discriminator.optimizer.schedule=linear",
        ),
        (["stages=[sft,sft_continued,rlvr]"], "rlvr.steps", "sft_continued in stages would have another number"),
        (["stages=[sft]"], "sft.max_updates", "with sft.ends=plateau"),
    ],
)
def test_a_length_that_other_numbers_follow_stays(tmp_path, before, key, reason):
    old, new = (dump_config(load_config("digits", [*before, *more])) for more in ([], [f"{key}=90000"]))
    with pytest.raises(CheckpointError, match=rf"{key}=90000 \(was \d+\) cannot be raised: .*{reason}"):
        refuse_changes(tmp_path, old, new, "the run")


def test_other_keys_stay_refused_beside_a_raised_one(tmp_path):
    old = dump_config(load_config("digits", ["stages=[rlvr]"]))
    longer = ["stages=[rlvr]", "rlvr.steps=90000"]
    refuse_changes(tmp_path, old, dump_config(load_config("digits", longer)), "the run")
    with pytest.raises(CheckpointError, match=r"rlvr\.prompts=3 \(was 16\)"):
        refuse_changes(tmp_path, old, dump_config(load_config("digits", [*longer, "rlvr.prompts=3"])), "the run")
