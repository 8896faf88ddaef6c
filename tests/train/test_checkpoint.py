"""Checkpoints: complete or not there; damage is found, named and passed over."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_fast.config import Config, OptimizerConfig
from prism_fast.data.order import SampleOrder
from prism_fast.engine import stored
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.world import World
from prism_fast.models.writing import DiskFullError
from prism_fast.train.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, read_checkpoint, save_checkpoint
from prism_fast.train.record import RunRecord, read_resume
from prism_fast.train.state import StageState
from tests.models.test_writing import CRASHED, DONE, die_at


class Tensors(dict):
    """Saves itself, as an engine does."""

    def save(self, folder: Path) -> None:
        save_file(self, folder / "engine.safetensors")


def _save(folder, step, *, stage="align", keep=2):
    policy, discriminator = Tensors(w=torch.full((3, 2), float(step))), Tensors(v=torch.arange(4))
    parts = {"policy": policy, "discriminator": discriminator}
    return save_checkpoint(folder, f"{stage}-{step:06d}", parts, {"stage": stage, "step": step}, keep=keep)


def test_what_is_saved_reads_back_and_only_the_newest_stay(tmp_path):
    for step in (9, 10, 100):
        _save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["align-000010", "align-000100"]
    found = latest_checkpoint(tmp_path, tell=pytest.fail)
    assert found.state == {"stage": "align", "step": 100}
    policy, discriminator = (load_file(found.folder(n) / "engine.safetensors") for n in ("policy", "discriminator"))
    assert torch.equal(policy["w"], torch.full((3, 2), 100.0)) and discriminator["v"].dtype == torch.int64


def test_a_later_stage_is_newer_whatever_its_step(tmp_path):
    _save(tmp_path, 500, stage="sft")
    _save(tmp_path, 3, stage="rlvr")
    assert latest_checkpoint(tmp_path, tell=pytest.fail).state["stage"] == "rlvr"


FILES = ("policy/engine.safetensors", "discriminator/engine.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_in_any_part_is_named_and_the_previous_checkpoint_used(tmp_path, name, damage):
    _save(tmp_path, 1)
    file = _save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    told: list[str] = []
    assert latest_checkpoint(tmp_path, tell=told.append).state["step"] == 1
    assert len(told) == 1 and "align-000002" in told[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "align-000002")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    """Every byte of the small files, and of the tensors' headers and contents."""
    file = _save(tmp_path, 1) / name
    content = file.read_bytes()
    rng = random.Random(7)
    for position in range(len(content)):
        bent = bytearray(content)
        bent[position] ^= 1 << rng.randrange(8)
        file.write_bytes(bent)
        told: list[str] = []
        assert latest_checkpoint(tmp_path, tell=told.append) is None, position
        assert len(told) == 1 and "align-000001" in told[0], position
    file.write_bytes(content)
    assert latest_checkpoint(tmp_path, tell=pytest.fail) is not None


def test_a_crash_at_any_step_of_saving_leaves_a_whole_checkpoint(tmp_path):
    """The one before or the new one, never a damaged one, and the next save clears what was left."""
    for n in range(1, 200):
        folder = tmp_path / str(n)
        _save(folder, 1, keep=1)
        code = die_at(n, folder, lambda folder=folder: _save(folder, 2, keep=1))
        assert latest_checkpoint(folder, tell=pytest.fail).state["step"] in (1, 2)
        if code == DONE:
            break
        assert code == CRASHED
        if n % 4 == 0:
            _save(folder, 3, keep=1)
            assert [p.name for p in folder.iterdir()] == ["align-000003"]
    assert code == DONE and n > 15


def test_a_full_disk_leaves_older_checkpoints_and_no_half_one(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", no_space)
    engine = LocalEngine(torch.nn.Linear(4, 3), OptimizerConfig())
    with pytest.raises(DiskFullError, match="no space left for .*align-000002.*it takes"):
        save_checkpoint(tmp_path, "align-000002", {"policy": engine}, {}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["align-000001"]


def test_room_is_looked_for_before_an_engine_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 50, 0, 100))
    engine = LocalEngine(torch.nn.Linear(40, 3), OptimizerConfig())
    with pytest.raises(DiskFullError, match=r"it takes .*free there"):
        engine.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_ignored_and_cleared(tmp_path):
    half = tmp_path / ".align-000002.999999999.partial"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path, tell=pytest.fail) is None
    _save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["align-000002"]


def test_a_checkpoint_of_a_complete_stage_is_not_gone_back_to(tmp_path):
    _save(tmp_path / "checkpoints", 7, stage="sft")
    assert read_resume(tmp_path, "", tell=pytest.fail).checkpoint_of("sft").state["step"] == 7
    RunRecord(completed=["sft"], metrics_bytes=123).write(tmp_path)
    resumed = read_resume(tmp_path, "", tell=pytest.fail)
    assert resumed.checkpoint is None and resumed.metrics_bytes() == 123


def test_a_damaged_record_is_refused_by_name(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"completed": [], "surprise": 1}))
    with pytest.raises(CheckpointError, match=r"record\.json"):
        read_resume(tmp_path, "", tell=pytest.fail)


def _train(engine, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        engine.backward(engine.module(torch.randn(5, 4, generator=generator)).square().mean())
        engine.step()
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def test_an_engine_goes_on_to_the_bit(tmp_path):
    def new():
        torch.manual_seed(0)
        return LocalEngine(torch.nn.Linear(4, 3), OptimizerConfig(lr=0.05, warmup_steps=6))

    straight = _train(new(), 9)
    first = new()
    _train(first, 4)
    save_checkpoint(tmp_path, "sft-000004", {"policy": first}, {}, keep=1)
    second, saved = new(), read_checkpoint(tmp_path / "sft-000004")
    second.load(saved.folder("policy"))
    assert second.updates == 4
    assert torch.equal(_train(second, 5, start=4), straight)
    with pytest.raises(ValueError, match="weight"):
        LocalEngine(torch.nn.Linear(3, 3), OptimizerConfig()).load(saved.folder("policy"))


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(tmp_path):
    """Before its tensors are looked at: they were one file per engine."""
    old = Checkpoint(tmp_path / "align-000004", {"format": 2, "stage": "align", "step": 4})
    run = SimpleNamespace(config=Config(), world=World(), resume=SimpleNamespace(checkpoint_of=lambda stage: old))
    engine = LocalEngine(torch.nn.Linear(4, 3), OptimizerConfig())
    with pytest.raises(CheckpointError, match=r"align-000004 was saved by another version .*start a new run"):
        StageState(run, "align", engines={"policy": engine}, budgets={}, order=SampleOrder(4, seed=1))
    assert engine.updates == 0
