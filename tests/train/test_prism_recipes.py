"""The published recipes on models of published sizes: everything but weights and images is checked, in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3VLConfig

from prism_fast.config import load_config
from prism_fast.models.policy import TinyPolicy, tiny_config
from prism_fast.plan import make_plan
from prism_fast.preflight import preflight

TEXT = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SIZES = {
    "4b": (
        TEXT | {"hidden_size": 2560, "intermediate_size": 9728},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "8b": (
        TEXT | {"hidden_size": 4096, "intermediate_size": 12288},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}


def policy_folder(folder: Path, size: str, processor) -> Path:
    """``config.json`` of a published size, a processor, and a file of weights that holds none."""
    text, vision = SIZES[size]
    ids = {f"{name}_token_id": 151_655 for name in ("image", "video", "vision_start", "vision_end")}
    config: Qwen3VLConfig = tiny_config(TinyPolicy(), vocab_size=151_936, **ids)
    rope = {**config.text_config.rope_parameters, "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    for name, value in (text | {"rope_parameters": rope, "max_position_embeddings": 262_144}).items():
        setattr(config.text_config, name, value)
    for name, value in (vision | {"num_heads": 16, "out_hidden_size": text["hidden_size"]}).items():
        setattr(config.vision_config, name, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = size == "4b"
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("recipe", ["prism_4b", "prism_8b", "prism_4b_lora"])
def test_a_dry_run_of_a_published_recipe(recipe, small_data, processor, tmp_path, monkeypatch):
    size = "8b" if "8b" in recipe else "4b"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**14, 0, 10**14))
    here = ["engine.kind=local", "rollout.engine=hf", "device=cpu"]  # no extras where tests run
    config = load_config(
        recipe, [f"model.policy={policy_folder(tmp_path / size, size, processor)}", *here, *small_data]
    )
    lines = preflight(config)
    assert any(line.startswith("rlvr.loss: preset grpo") for line in lines)
    lora = recipe == "prism_4b_lora"
    plan = make_plan(config, card="h100")
    assert plan.fits or not lora  # the others are for eight cards, which a plan does not divide by
    assert plan.policy.parameters == pytest.approx({"4b": 4.4e9, "8b": 8.8e9}[size], rel=0.02)
    moments = {stage.stage: stage for stage in plan.stages}["rlvr"].phases[0].components
    optimizer = next(part.bytes for part in moments if part.name == "policy optimizer")
    assert (optimizer < 2**30) == lora
    assert [stage.stage for stage in plan.stages] == (["sft", "rlvr"] if lora else ["sft", "warmup", "align", "rlvr"])


def test_settings_are_the_published_ones():
    for recipe in ("prism_4b", "prism_8b"):
        config = load_config(recipe, ["model.policy=x"])
        assert (config.sft.epochs, config.sft.optimizer.lr, config.sft.optimizer.schedule) == (1.0, 1e-5, "cosine")
        assert config.sft.freeze == ["model.visual.*"] and config.sft.optimizer.warmup_share == 0.1
        assert config.align.steps * config.align.prompts == 2000 and config.align.rollout.n == 16
        assert (config.rlvr.steps, config.rlvr.prompts, config.rlvr.rollout.n) == (1500, 32, 16)
        assert config.align.optimizer.lr == config.align.discriminator.optimizer.lr == config.rlvr.optimizer.lr == 1e-6
        for count in (config.sft.batch, config.warmup.prompts, config.align.prompts, config.rlvr.prompts):
            assert count % 8 == 0  # ranks
