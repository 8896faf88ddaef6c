"""Checks that stock transformers makes the same model of an exported folder as we do."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism_fast.models.discriminator import EXPERT_KEYS, HEAD_KEY, load_discriminator
from prism_fast.models.forward import collate, language_outputs
from prism_fast.models.policy import load_policy
from prism_fast.models.processor import Processor, Prompt


def stock_inputs(prompt: Prompt, config) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt.input_ids])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
    }


@torch.no_grad()
def assert_policy_export(folder: Path, prompt: Prompt) -> None:
    """Every tensor bit for bit, logits bit for bit through the same modules, and to 1e-10 in float64 between the stock
    forward and ours (which computes the patch embedding as a matrix product and needs no mask)."""
    ours = load_policy(folder)
    stock, info = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = stock.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    inputs = stock_inputs(prompt, ours.config)
    ours.model.visual.patch_embed.proj, own = stock.model.visual.patch_embed.proj, ours.model.visual.patch_embed.proj
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    ours.model.visual.patch_embed.proj = own
    ours, stock = ours.double(), stock.double()
    pad_id = Processor.from_pretrained(folder).pad_id
    batch = collate([prompt], [0], [[]], model_config=ours.config, pad_id=pad_id)
    found = ours.lm_head(language_outputs(ours.model, batch).last_hidden_state)
    expected = stock(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))  # float32 islands


@torch.no_grad()
def assert_discriminator_export(folder: Path, prompt: Prompt) -> None:
    """The same of the backbone; experts stand in the file as released checkpoints hold them."""
    ours = load_discriminator(folder)
    stock, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert set(info["unexpected_keys"]) <= {HEAD_KEY} and not info["missing_keys"] and not info["mismatched_keys"]
    theirs = stock.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.backbone.state_dict().items())
    assert any(name.endswith(EXPERT_KEYS) for name in theirs)
    inputs = stock_inputs(prompt, ours.backbone.config)
    stock.set_experts_implementation("eager")  # the one that computes in float64 on a CPU
    ours, stock = ours.double(), stock.double()
    found, expected = ours.backbone(**inputs).last_hidden_state, stock.model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))  # float32 islands
