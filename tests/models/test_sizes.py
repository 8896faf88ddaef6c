"""Sizes computed from a configuration against real models, caches and what autograd really keeps."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.forward import collate, language_outputs
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.score_rows import states_at
from prism_fast.models.sizes import (
    discriminator_size,
    kv_bytes_per_token,
    language_activation_bytes,
    policy_size,
    vision_activation_bytes,
)
from prism_fast.models.upcycle import sparse_config
from tests.support.live_bytes import LiveBytes
from tests.support.small_policy import SMALL

# Equal to the byte with the pinned versions; the next transformers may keep a small tensor more.
TOLERANCE = 0.002


def kept_bytes(model, run) -> int:
    """Bytes of the distinct storages that autograd keeps while ``run()`` goes forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address must not be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out is not None
    return sum(kept.values())


def real_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_bytes_of_the_policy_are_exact(processor, dtype):
    for size in (SMALL, TinyPolicy(), TinyPolicy(num_layers=1, vision_depth=3, deepstack_layers=(0, 1))):
        model = build_tiny_policy(processor, size, 1).to(dtype)
        computed = policy_size(model.config, dtype)
        assert computed.parameters == sum(p.numel() for p in model.parameters())
        assert computed.tensors == len(list(model.parameters()))
        assert computed.weight_bytes == real_bytes(model)
        assert computed.vision == sum(p.numel() for p in model.model.visual.parameters())
        assert computed.active == sum(p.numel() for p in model.model.language_model.layers.parameters()) + (
            model.config.text_config.hidden_size  # the final norm
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 3), (1, 1)])
def test_parameters_and_bytes_of_the_discriminator_are_exact(policy, dtype, experts, top_k):
    dense = copy.deepcopy(policy).to(dtype)
    model = build_discriminator(dense, num_experts=experts, top_k=top_k, seed=1)
    computed = discriminator_size(sparse_config(dense.config, experts, top_k), dtype)
    assert computed.parameters == sum(p.numel() for p in model.parameters())
    assert computed.weight_bytes == real_bytes(model)
    blocks = [layer.mlp.experts for layer in model.backbone.language_model.layers]
    assert computed.experts == sum(p.numel() for block in blocks for p in block.parameters())
    assert computed.active < computed.parameters


def test_no_numbers_are_allocated_for_a_large_model(policy):
    config = copy.deepcopy(policy.config)
    config.text_config.hidden_size, config.text_config.intermediate_size = 1 << 14, 3 << 14
    config.text_config.vocab_size = 1 << 20
    assert policy_size(config, torch.bfloat16).weight_bytes > 30 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_a_real_cache(policy, processor, make_prompt, make_rows, dtype):
    model = copy.deepcopy(policy).to(dtype)
    rows = make_rows([7, 3, 12])
    batch = collate([make_prompt((64, 32))], [0] * 3, rows, model_config=model.config, pad_id=processor.pad_id)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model.language_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, past_key_values=cache, use_cache=True
        )
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == batch.input_ids.numel() * kv_bytes_per_token(model.config.text_config, dtype)


SHAPES = [SMALL, replace(SMALL, num_layers=3, num_kv_heads=4, intermediate_size=80)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SHAPES, ids=["grouped-queries", "full-heads"])
@pytest.mark.parametrize("sparse", [False, True])
def test_text_activations_are_what_autograd_keeps(processor, make_prompt, make_rows, dtype, size, sparse):
    model = build_tiny_policy(processor, size, 3).to(dtype)
    if not sparse:
        backbone, options = model.model, {}
    else:
        backbone, options = build_discriminator(model, seed=3).backbone, {"output_router_logits": True}
    rows = make_rows([90, 40, 60])
    batch = collate([make_prompt()], [0] * 3, rows, model_config=model.config, pad_id=processor.pad_id)
    kept = kept_bytes(backbone, lambda: language_outputs(backbone, batch, **options))
    text, tokens = backbone.config.text_config, batch.input_ids.numel()
    assert kept == pytest.approx(language_activation_bytes(text, tokens, dtype, sparse=sparse), rel=TOLERANCE)
    if sparse:
        ends = batch.lengths - 1 + torch.arange(3) * batch.input_ids.shape[1]
        kept = kept_bytes(backbone, lambda: states_at(backbone, ends, partial(language_outputs, backbone, batch))[0])
        computed = language_activation_bytes(text, tokens, dtype, sparse=True, scored=3)
        assert kept == pytest.approx(computed, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [SMALL, replace(SMALL, vision_depth=4, deepstack_layers=(0, 2))])
def test_vision_activations_are_what_autograd_keeps(processor, make_prompt, dtype, size):
    model = build_tiny_policy(processor, size, 3).to(dtype)
    prompt = make_prompt((128, 64), (64, 64))
    kept = kept_bytes(
        model, lambda: model.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw, return_dict=True)
    )
    computed = vision_activation_bytes(model.config.vision_config, len(prompt.pixel_values), dtype)
    assert kept == pytest.approx(computed, rel=TOLERANCE)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_checkpointing_saves_what_the_formulas_say(processor, make_prompt, make_rows, sparse):
    """The peak of a step without and with it; what else there is then they have in common, but for the gradients that
    exist by then: a twentieth of the difference."""
    model = build_tiny_policy(processor, replace(SMALL, num_layers=8, vision_depth=6), 3)
    backbone = build_discriminator(model, seed=3).backbone if sparse else model.model
    prompt = make_prompt((128, 64))
    batch = collate([prompt] * 8, range(8), make_rows([90] * 8), model_config=model.config, pad_id=processor.pad_id)
    text, vision, tokens = backbone.config.text_config, backbone.config.vision_config, batch.input_ids.numel()
    peaks, computed = [], []
    for checkpointing in (False, True):
        backbone.train().zero_grad()
        if checkpointing:
            use_gradient_checkpointing(backbone)
        with LiveBytes() as live:
            language_outputs(backbone, batch).last_hidden_state.sum().backward()
        peaks.append(live.peak)
        options = {"checkpointing": checkpointing}
        computed.append(
            language_activation_bytes(text, tokens, torch.float32, sparse=sparse, **options)
            + vision_activation_bytes(vision, len(batch.pixel_values), torch.float32, **options)
        )
    assert peaks[0] - peaks[1] == pytest.approx(computed[0] - computed[1], rel=0.05)
