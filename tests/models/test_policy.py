from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from prism_fast.models.forward import collate, hidden_states
from prism_fast.models.policy import TinyPolicy, build_tiny_policy, load_policy, save_policy
from prism_fast.models.processor import Processor
from tests.models.conftest import SMALL


@pytest.fixture(scope="module")
def folder(policy, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    save_policy(policy, processor, path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the checkpoint and a function that rewrites its tensors."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)

    def rewrite(**changes: torch.Tensor | None):
        state = load_file(copy / "model.safetensors")
        for name, tensor in changes.items():
            key = name.replace("__", ".")
            state.pop(key, None)
            if tensor is not None:
                state[key] = tensor
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return rewrite


def test_the_seed_alone_decides_the_weights_and_global_random_state_is_untouched(processor):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = build_tiny_policy(processor, SMALL, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    two = build_tiny_policy(processor, SMALL, seed=3).state_dict()
    other = build_tiny_policy(processor, SMALL, seed=4).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["model.visual.patch_embed.proj.weight"], other["model.visual.patch_embed.proj.weight"])


def test_default_sizes(processor):
    model = build_tiny_policy(processor, TinyPolicy(), seed=0)
    assert type(model) is Qwen3VLForConditionalGeneration
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.image_token_id == processor.image_token_id
    assert set(model.generation_config.eos_token_id) == {processor.eos_id, processor.pad_id}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mrope_section": (6, 5, 4)}, "mrope_section"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"vision_heads": 5}, "vision_width"),
        ({"vision_positions": 50}, "square number"),
        ({"intermediate_size": 64}, "square expert"),
        ({"intermediate_size": 128}, "square expert"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TinyPolicy(), **change)


def test_save_and_load_keep_every_bit_and_the_processor(policy, folder, make_prompt):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = load_policy(folder)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = loaded.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in policy.state_dict().items())
    prompt = make_prompt((64, 32))
    batch = collate(
        [prompt], [0], [[1, 2]], model_config=loaded.config, pad_id=Processor.from_pretrained(folder).pad_id
    )
    with torch.no_grad():
        assert torch.equal(hidden_states(loaded.model, batch), hidden_states(policy.model, batch))


def test_the_folder_loads_in_stock_transformers(policy, folder):
    stock, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(stock.model.visual.patch_embed.proj.weight, policy.model.visual.patch_embed.proj.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_honoured(folder, dtype):
    assert {p.dtype for p in load_policy(folder, dtype=dtype).parameters()} == {dtype}


def test_missing_unexpected_and_mismatched_tensors_are_all_named(broken):
    path = broken(
        model__visual__merger__norm__weight=None,
        model__language_model__norm__weight=torch.zeros(7),
        model__stray=torch.zeros(1),
    )
    with pytest.raises(ValueError) as error:
        load_policy(path)
    text = str(error.value)
    assert "missing model.visual.merger.norm.weight" in text
    assert "model.language_model.norm.weight (file (7,), model (32,))" in text
    assert "unexpected model.stray" in text


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_policy(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled checkpoint is there but is never read"):
        load_policy(copy)
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="'qwen2_vl' model, but a policy must be 'qwen3_vl'"):
        load_policy(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name a model_type"):
        load_policy(copy)
