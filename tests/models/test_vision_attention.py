from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from prism_fast.models.vision import encode_images
from prism_fast.models.vision_attention import BatchedVisionAttention, use_batched_vision_attention


@pytest.fixture(scope="module")
def towers():
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        }
    ).vision_config
    stock = Qwen3VLVisionModel._from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    ours = copy.deepcopy(stock)
    holder = torch.nn.Module()
    holder.visual = ours
    for _ in range(2):
        use_batched_vision_attention(holder)
    assert all(isinstance(block.attn, BatchedVisionAttention) for block in ours.blocks)
    assert list(ours.state_dict()) == list(stock.state_dict())
    return stock, ours


GRIDS = {
    "equal": [[1, 4, 2]] * 3,
    "mixed": [[1, 4, 2], [1, 2, 2], [1, 2, 4], [1, 6, 4], [1, 2, 2]],
    "frames": [[2, 4, 2], [1, 4, 4]],
    "one": [[1, 2, 2]],
}


@pytest.mark.parametrize("name", GRIDS)
def test_features_and_gradients_equal_the_stock_tower(towers, generator, name):
    grid = torch.tensor(GRIDS[name])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 8 * 8, generator=generator, dtype=torch.float64)
    results = []
    for tower in towers:
        out = tower(pixels, grid_thw=grid, return_dict=True)
        parts = [out.pooler_output, *out.deepstack_features]
        seeds = torch.Generator().manual_seed(1)
        loss = sum((p * torch.randn(p.shape, generator=seeds, dtype=p.dtype)).sum() for p in parts)
        results.append([*parts, *torch.autograd.grad(loss, list(tower.parameters()))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_attention_is_called_once_per_size_and_asks_for_no_length(policy, make_prompt, monkeypatch):
    prompts = [make_prompt(size) for size in ((64, 32), (32, 32), (64, 32), (32, 64), (96, 32))]
    pixels = torch.cat([p.pixel_values for p in prompts])
    grid = torch.cat([p.image_grid_thw for p in prompts])
    calls = []
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(tuple(a[0].shape[::2])), right(*a, **k))[1],
    )
    with torch.no_grad():
        encode_images(policy.model, pixels, grid)
    assert calls == [(1, 12), (3, 8), (1, 4)] * policy.config.vision_config.depth
