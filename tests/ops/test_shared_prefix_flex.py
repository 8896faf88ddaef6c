"""FlexAttention, which knows nothing of our code, computes the same from a rule per pair of tokens, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from prism_fast.ops import PrefixLayout, shared_prefix_attention
from tests.ops.test_shared_prefix_attention import layout_of

# Two groups and a plain sequence; branches of one token and of none.
SEGMENTS = [(37, -1), (50, 0), (1, 0), (20, 0), (45, -1), (33, 4), (0, 4), (9, -1)]
TOKENS = sum(n for n, _ in SEGMENTS)


def by_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention with the rule of ``SEGMENTS`` as its mask. q [T, Hq, D], k and v [T, Hk, D]."""
    owner = torch.cat([torch.full((n,), s) for s, (n, _) in enumerate(SEGMENTS)]).to(q.device)
    prefix = torch.tensor([p for _, p in SEGMENTS], device=q.device)[owner]

    def sees(_batch, _head, query, key):
        own = (owner[query] == owner[key]) & (query >= key)
        return own | (prefix[query] == owner[key])

    mask = flex.create_block_mask(sees, None, None, TOKENS, TOKENS, device=q.device)
    out = flex.flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def compare(backend: str, dtype: torch.dtype, device: str, generator: torch.Generator, tolerance: float) -> None:
    layout = PrefixLayout(*(x.to(device) if isinstance(x, Tensor) else x for x in layout_of(SEGMENTS)))
    heads, key_heads, width = 4, 2, 16
    inputs = [
        torch.randn(TOKENS, h, width, generator=generator, dtype=torch.float64).to(device, dtype)
        for h in (heads, key_heads, key_heads, heads)
    ]
    found = []
    for attention in (by_rule, lambda *x: shared_prefix_attention(*x, layout, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = attention(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[3])])
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_equals_flex_attention(backend, generator, monkeypatch):
    # It refuses inputs that want a gradient on the CPU; the formula it runs uncompiled has one.
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    compare(backend, torch.float64, "cpu", generator, 1e-11)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["triton", "stock"])
def test_equals_flex_attention_on_the_card(backend, generator):
    compare(backend, torch.float32, "cuda", generator, 1e-4)
