"""A step of generation on a CPU: stock attention's bits, without its copies of keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import sdpa_attention

from prism_fast.models.shared_prefix import shared_prefix_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "heads"), [(7, 33, (4, 2)), (1, 1, (8, 1)), (3, 130, (2, 2))])
def test_a_decoding_step_has_the_bits_of_sdpa_and_copies_no_key(rows, keys, heads, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(rows, heads[0], 1, 32, generator=generator).to(dtype)
    key, value = (torch.randn(rows, heads[1], keys, 32, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(rows, 1, 1, keys, generator=generator) > 0.3
    mask[..., -1] = True
    module = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True)
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)

    def copies(*args):
        raise AssertionError("keys were repeated")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", copies)
    out, _ = shared_prefix_attention(module, query, key, value, mask, scaling=0.2)
    assert torch.equal(out, expected)
    assert out.is_contiguous()
