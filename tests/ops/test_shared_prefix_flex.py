"""FlexAttention, which knows nothing of our code, computes the same from a rule per pair of tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prism_fast.ops import shared_prefix_attention
from tests.ops.test_shared_prefix_attention import layout_of

SEGMENTS = [(37, -1), (50, 0), (1, 0), (20, 0), (45, -1), (33, 4), (0, 4), (9, -1)]


@pytest.mark.long  # loading FlexAttention takes seconds
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_equals_flex_attention(backend, generator):
    tokens, heads, key_heads, width = sum(n for n, _ in SEGMENTS), 4, 2, 8
    owner = torch.cat([torch.full((n,), s) for s, (n, _) in enumerate(SEGMENTS)])
    prefix = torch.tensor([p for _, p in SEGMENTS])[owner]

    def sees(_batch, _head, query, key):
        own = (owner[query] == owner[key]) & (query >= key)
        return own | (prefix[query] == owner[key])

    # Forward only: FlexAttention has no backward on the CPU.
    q, k, v = (torch.randn(tokens, h, width, generator=generator) for h in (heads, key_heads, key_heads))
    mask = create_block_mask(sees, None, None, tokens, tokens, device="cpu")
    wanted = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True)
    found = shared_prefix_attention(q, k, v, layout_of(SEGMENTS), backend=backend)
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
