"""The formula counts the operations that PyTorch itself counts in transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeModel,
)

from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import tiny_config
from prism_fast.models.processor import Prompt
from prism_fast.track.flops import (
    forward_flops,
    head_flops,
    mlp_weights,
    peak_flops,
    tower_flops,
    trunk_flops,
    visible_pairs,
)
from tests.support.small_policy import SMALL

CONFIG = tiny_config(
    SMALL, vocab_size=100, image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
)


def counted(run) -> int:
    with torch.device("cpu"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (3, 20)])
def test_a_policy_with_its_head(rows, width):
    """PyTorch counts every pair of a row; the formula gets as many here."""
    model = Qwen3VLForConditionalGeneration._from_config(CONFIG, attn_implementation="eager")
    ids = torch.randint(0, 80, (rows, width))
    text = CONFIG.text_config
    wanted = trunk_flops(text, rows * width, rows * width**2) + head_flops(text, rows * width)
    rotary = 2 * rows * 3 * width * (text.head_dim // 2)  # the table of angles, a product of matrices in transformers
    assert counted(lambda: model(input_ids=ids, use_cache=False)) == wanted + rotary


@pytest.mark.parametrize("grids", [[(1, 4, 4)], [(1, 2, 6), (1, 4, 2)], [(2, 2, 2)]])
def test_a_vision_tower(grids):
    tower = Qwen3VLModel._from_config(CONFIG, attn_implementation="eager").visual
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 16 * 16)
    grid = torch.tensor(grids)
    assert counted(lambda: tower(pixels, grid_thw=grid)) == tower_flops(CONFIG.vision_config, grids)


def test_experts():
    """Behind dense layers nothing but the mixture differs: the router and the chosen experts of every token."""
    text = CONFIG.text_config.to_dict() | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=CONFIG.vision_config.to_dict())
    model = Qwen3VLMoeModel._from_config(config, attn_implementation="eager", experts_implementation="eager")
    block = model.language_model.layers[0].mlp
    rows = torch.randn(1, 11, 32)
    assert counted(lambda: block(rows)) == 2 * 11 * mlp_weights(config.text_config)


def group(prompt: int, branches: list, grid=None) -> PromptGroup:
    grids = None if grid is None else torch.tensor(grid)
    return PromptGroup(Prompt((1,) * prompt, None, grids), branches)


def test_groups_by_hand():
    text, vision = CONFIG.text_config, CONFIG.vision_config
    grid = [[1, 4, 4]]
    groups = [group(10, [(1,) * 3, None, (1,) * 5], grid), group(6, [None, None], grid), group(2, [(1,)])]
    pairs = 10 * 11 // 2 + (3 * 10 + 6) + (5 * 10 + 15) + 2 * 3 // 2 + (2 + 1)
    trunk = trunk_flops(text, 10 + 8 + 2 + 1, pairs)
    assert forward_flops(CONFIG, groups, vocabulary=False) == trunk + tower_flops(vision, grid)
    assert forward_flops(CONFIG, groups, vocabulary=True) == trunk + tower_flops(vision, grid) + head_flops(text, 9)
    assert forward_flops(CONFIG, [], vocabulary=True) == 0


@pytest.mark.parametrize(("prompt", "lengths"), [(3, [2, 4]), (0, [5]), (4, [])])
def test_pairs_are_those_of_the_mask(prompt, lengths):
    owner = torch.tensor([-1] * prompt + [k for k, n in enumerate(lengths) for _ in range(n)])
    mask = (owner[:, None] == owner) | (owner == -1)
    assert visible_pairs(prompt, lengths) == int(mask.tril().sum())


def test_peaks_of_known_cards_alone():
    peaks = {
        "NVIDIA H200": 989.4,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA L40S": 362.1,
        "NVIDIA L4": 121.0,
        "NVIDIA GeForce RTX 4090": 165.2,
    }
    for card, peak in peaks.items():
        assert peak_flops(card, torch.bfloat16) == pytest.approx(peak * 1e12)
        assert 0 < peak_flops(card, torch.float32) < peak * 1e12
        assert peak_flops(card, torch.float16) is None
    for card in ("NVIDIA L40", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090X", "", "cpu"):
        assert peak_flops(card, torch.bfloat16) is None
