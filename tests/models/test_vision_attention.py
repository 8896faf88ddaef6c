from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention, Qwen3VLVisionModel

from prism_fast.models import vision_attention
from prism_fast.models.vision import encode_images
from prism_fast.models.vision_attention import BatchedVisionAttention, use_batched_vision_attention
from prism_fast.ops.stock import varlen
from tests.support import varlen_kernels


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


@pytest.mark.parametrize("kernels", ["by size", *varlen_kernels.PLAYED])
@pytest.mark.parametrize("name", GRIDS)
def test_features_and_gradients_equal_the_stock_tower(towers, generator, monkeypatch, name, kernels):
    if kernels != "by size":  # the card's kernels for half precision, played in float64
        kernel = varlen_kernels.played_kernels(monkeypatch, kernels)
        monkeypatch.setattr(varlen, "kernel_for", lambda *who: kernel)
        monkeypatch.setattr(vision_attention, "_has_varlen_kernel", lambda q: True)
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


@pytest.mark.gpu
@pytest.mark.parametrize("choice", varlen_kernels.CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_float64_is_that_of_the_stock_module_on_the_card(dtype, choice, generator):
    """By the varlen kernel: twice the stock module's error plus 4 units in the last place, and no synchronisation."""
    lengths, heads, width = (320, 4, 64, 320), 4, 72
    config = Qwen3VLConfig(vision_config={"hidden_size": heads * width, "num_heads": heads}).vision_config
    config._attn_implementation = "sdpa"
    stock = Qwen3VLVisionAttention(config).to("cuda", dtype)
    hidden = torch.randn(sum(lengths), heads * width, generator=generator).to("cuda", dtype)
    upstream = torch.randn(hidden.shape, generator=generator).to("cuda", dtype)
    angle = torch.randn(sum(lengths), width // 2, generator=generator).repeat(1, 2).cuda()
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    def run(module, kind, **known):
        leaf = hidden.to(kind, copy=True).requires_grad_()
        turn = (angle.cos(), angle.sin())
        out = module(leaf, cu_seqlens=cu, position_embeddings=turn, **known)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], upstream.to(kind))]

    exact = run(copy.deepcopy(stock).double(), torch.float64)
    theirs = run(stock, dtype)
    with varlen_kernels.on_the_card(choice, dtype):
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = run(BatchedVisionAttention(stock), dtype, frame_lengths=lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    unit = torch.finfo(dtype).eps
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * unit * c.norm()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * unit * c.abs().max()
