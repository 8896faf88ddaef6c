"""Any checkpoint as a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from prism_fast.cli import app
from prism_fast.models.policy import load_policy
from prism_fast.models.processor import Processor
from prism_fast.train.checkpoint import CheckpointError
from prism_fast.train.export import export_checkpoint
from tests.train.conftest import run_small


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.timeout(600)
def test_a_policy_with_adapters_at_any_step(small_run, finished, tmp_path):
    start = finished / "export" / "sft"
    settings = ["stages=[rlvr]", "eval.limit=1", f"model.policy={start}", "rlvr.optimizer.lr=0.01", "rlvr.steps=3"]
    settings += ["model.lora.rank=2", "model.dtype=bfloat16", "checkpoint_every=1", "keep_checkpoints=5"]
    run = run_small(tmp_path / "run", [*small_run, *settings])
    last, earlier = run / "checkpoints" / "rlvr-000003", run / "checkpoints" / "rlvr-000001"
    found = CliRunner().invoke(app, ["export", str(last), str(tmp_path / "last")])
    assert found.exit_code == 0, found.output
    assert same(tmp_path / "last", run / "export" / "rlvr")
    assert export_checkpoint(earlier, tmp_path / "earlier") == "policy"
    assert not same(tmp_path / "earlier", tmp_path / "last")
    load_policy(tmp_path / "earlier")
    Processor.from_pretrained(tmp_path / "earlier")
    with pytest.raises(FileExistsError):
        export_checkpoint(last, tmp_path / "last")
    with pytest.raises(CheckpointError, match="rlvr-000003 holds no discriminator, but policy"):
        export_checkpoint(last, tmp_path / "none", "discriminator")
    with pytest.raises(CheckpointError, match="has no config.yaml"):
        export_checkpoint(tmp_path / "earlier", tmp_path / "none")
    shutil.copytree(run, tmp_path / "copy")
    record = json.loads((tmp_path / "copy" / "record.json").read_text())
    assert record["began"]["rlvr"][0] == str(start)
    engine = tmp_path / "copy" / "checkpoints" / "rlvr-000003" / "policy" / "engine.safetensors"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="was altered"):
        export_checkpoint(engine.parent.parent, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_discriminator(small_run, finished, tmp_path):
    settings = ["stages=[warmup]", f"model.policy={finished / 'export' / 'sft'}"]
    run = run_small(tmp_path / "run", [*small_run, *settings])
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert export_checkpoint(checkpoint, tmp_path / "out") == "discriminator"
    assert same(tmp_path / "out", run / "export" / "discriminator-warmup")
    shutil.rmtree(run / "export")
    with pytest.raises(CheckpointError, match="no folder tells how the discriminator of warmup is built"):
        export_checkpoint(checkpoint, tmp_path / "again")
