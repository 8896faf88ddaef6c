"""Stages that train adapters, or some of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.config import ConfigError, load_config
from prism_fast.plan import make_plan
from prism_fast.preflight import disk_needs, preflight
from prism_fast.track.metrics import reproducible
from prism_fast.train.pipeline import run_stages
from tests.train.conftest import run_small

LORA = ["model.lora.rank=4", "model.lora.alpha=8", "model.lora.save_adapter=true"]
RLVR = ["stages=[rlvr]", "eval.limit=4", "rlvr.steps=4", "rlvr.optimizer.lr=0.01", "checkpoint_every=2"]


def lines(folder: Path, stage: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records if record["stage"] == stage]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.timeout(600)
def test_a_stage_with_adapters_resumes_to_the_bit_and_changes_their_layers_alone(small_run, finished, tmp_path):
    start = finished / "export" / "sft"
    whole = run_small(tmp_path / "whole", [*small_run, *RLVR, *LORA, f"model.policy={start}"])
    records = lines(whole, "rlvr")
    assert sum("policy/grad_norm" in record for record in records) >= 2
    counts = records[0]
    assert 0 < counts["model/trained_parameters"] < 0.1 * counts["model/parameters"]
    before, after = weights(start), weights(whole / "export" / "rlvr")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {name for name in before if name.endswith("_proj.weight") and ".language_model." in name}
    adapter = whole / "export" / "rlvr-adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start.resolve())

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "rlvr-000004")
    shutil.rmtree(cut / "export")
    record = json.loads((cut / "record.json").read_text())
    (cut / "record.json").write_text(json.dumps(record | {"completed": [], "policy": str(start)}))
    run_stages(load_config(str(cut / "config.yaml"), [f"out={cut}"]), Console(quiet=True), resume=True)
    assert lines(cut, "rlvr") == records and lines(cut, "eval") == lines(whole, "eval")
    for file in ("rlvr/model.safetensors", "rlvr-adapter/adapter_model.safetensors"):
        again, first = load_file(cut / "export" / file), load_file(whole / "export" / file)
        assert all(torch.equal(again[name], first[name]) for name in first), file


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_adapters_learn_from_rewards(small_run, finished, tmp_path):
    """Measured over eighty steps, by tens: 0.25 0.33 0.38 0.43 0.45 0.46 0.45 0.46."""
    settings = {"stages": "[rlvr]", "data.eval": "null", "model.policy": finished / "export" / "sft"}
    settings |= {"rlvr.steps": 60, "rlvr.prompts": 8, "rlvr.rollout.n": 8, "rlvr.optimizer.lr": 0.002}
    settings |= {"model.lora.rank": 8, "model.lora.alpha": 16}
    run = run_small(tmp_path / "run", [*small_run, *(f"{key}={value}" for key, value in settings.items())])
    accuracy = [line["reward/acc"] for line in lines(run, "rlvr") if line["step"]]
    assert sum(accuracy[-15:]) / 15 > sum(accuracy[:15]) / 15 + 0.05


def test_sft_leaves_what_is_frozen(small_run, finished, tmp_path):
    start = finished / "export" / "sft"
    settings = ["stages=[sft]", "eval.limit=1", "sft.ends=updates", "sft.max_updates=2", "sft.freeze=[model.visual.*]"]
    run = run_small(tmp_path / "run", [*small_run, *settings, f"model.policy={start}"])
    before, after = weights(start), weights(run / "export" / "sft")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("model.visual.")} <= same
    assert "model.language_model.layers.0.mlp.up_proj.weight" not in same
    saved = load_file(run / "checkpoints" / "sft-000002" / "policy" / "engine.safetensors")
    assert not [name for name in saved if name.startswith("exp_avg.model.visual.")]
    assert [name for name in saved if name.startswith("exp_avg.model.language_model.")]


def test_the_plan_counts_what_learns(small_run, finished):
    base = [*small_run, "stages=[rlvr]", f"model.policy={finished / 'export' / 'sft'}", "model.dtype=bfloat16"]

    def of(*settings: str):
        config = load_config("digits", [*base, *settings])
        phase = next(p for p in make_plan(config).stages[0].phases if p.name == "policy update")
        parts = {part.name: part.bytes for part in phase.components}
        return parts, sum(disk_needs(config).values())

    plain, disk = of()
    lora, lora_disk = of(*LORA)
    rows = 0
    saved = weights(finished / "export" / "sft")
    for name, weight in saved.items():
        if name.endswith("_proj.weight") and ".language_model." in name:
            rows += 4 * sum(weight.shape)
    assert lora["policy masters"] == lora["policy gradients"] == 4 * rows
    assert lora["policy weights"] == plain["policy weights"] + 2 * rows
    assert lora["vision activations"] == 0 < plain["vision activations"]
    assert lora["gradients formed in the output head"] < plain["gradients formed in the output head"]
    assert lora_disk < disk
    frozen, _ = of("model.freeze=[model.visual.*]")
    vision = sum(weight.numel() for name, weight in saved.items() if ".visual." in name)
    assert frozen["policy gradients"] == plain["policy gradients"] - 4 * vision


def test_a_wrong_pattern_is_found_before_the_run(small_run, finished):
    base = [*small_run, "stages=[rlvr]", f"model.policy={finished / 'export' / 'sft'}"]
    with pytest.raises(ValueError, match=r"model\.freeze: 'visual\.\*' matches no parameter"):
        preflight(load_config("digits", [*base, "model.freeze=['visual.*']"]))
    with pytest.raises(ConfigError, match="model.policy must be the folder of a trained policy with model.lora"):
        preflight(load_config("digits", [*small_run, "stages=[sft]", "model.lora.rank=2"]))
    with pytest.raises(NotImplementedError, match="match lm_head"):
        preflight(load_config("digits", [*base, "model.lora.rank=2", "model.lora.targets=['lm_*']"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[rlvr]", "model.lora.rank=2", "model.freeze=[a]"], "model.freeze must be left out with model.lora"),
        (["stages=[rlvr]", "model.lora.rank=2", "sft.freeze=[a]"], "sft.freeze must be left out with model.lora"),
        (["stages=[rlvr]", "model.lora.rank=2", "model.lora.targets=[]"], "model.lora.targets must be at least one"),
        (["model.lora.save_adapter=true"], "model.lora.save_adapter must be left out without model.lora.rank"),
        (["model.lora.alpha=0"], "model.lora.alpha must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config("digits", overrides)
