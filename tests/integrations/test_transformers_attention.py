from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from prism_fast.integrations.transformers import register
from tests.ops.test_shared_prefix_attention import layout_of


def test_a_stock_language_model_takes_a_packed_row(generator):
    """Its packed row gives the hidden states of every branch with the prompt in front."""
    register()
    register()
    config = Qwen3VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )
    torch.manual_seed(0)
    model = Qwen3VLTextModel._from_config(config, attn_implementation="prism_shared_prefix").eval()
    prompt, branches = 6, (4, 1, 5)
    ids = torch.randint(0, 64, (prompt + sum(branches),), generator=generator)
    layout = layout_of([(prompt, -1), *((n, 0) for n in branches)])
    places = torch.cat([torch.arange(prompt), *(prompt + torch.arange(n) for n in branches)]).expand(3, 1, -1)
    with torch.no_grad():
        packed = model(ids[None], position_ids=places, use_cache=False, prefix_layout=layout).last_hidden_state[0]
        start = prompt
        for n in branches:
            alone = torch.cat((ids[:prompt], ids[start : start + n]))
            alone = model(alone[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[start : start + n], alone[prompt:], rtol=1e-4, atol=1e-4)
            start += n


def test_a_mask_or_dropout_on_a_packed_row_is_refused(generator):
    register()
    attention = AttentionInterface()["prism_shared_prefix"]
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 3, 8, generator=generator)
    layout = layout_of([(2, -1), (1, 0)])
    assert attention(None, q, k, k, None, prefix_layout=layout)[0].shape == (1, 3, 4, 8)
    with pytest.raises(NotImplementedError, match="dropout 0.1"):
        attention(None, q, k, k, None, dropout=0.1, prefix_layout=layout)
    with pytest.raises(NotImplementedError, match="a mask"):
        attention(None, q, k, k, torch.ones(1, 1, 3, 3), prefix_layout=layout)
