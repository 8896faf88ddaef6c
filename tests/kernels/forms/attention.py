"""Shared-prefix attention, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from prism_fast.ops.triton import shared_prefix_attention
from tests.kernels.forms import DTYPES, Form, empty

# (heads, key heads, width of a head): policies of 2B to 8B, the discriminator, the built-in example, other models.
HEADS = {
    "32+8x128": (32, 8, 128),
    "16+8x128": (16, 8, 128),
    "4+2x32": (4, 2, 32),
    "8+2x64": (8, 2, 64),
    "8+2x96": (8, 2, 96),
}
SEGMENTS = 17  # a prefix and 16 branches
TOKENS = (17 * 1024, 2048 + 16 * 512, 1023, 17)


def attention(tokens: int, *, dtype: torch.dtype, heads: tuple[int, ...]) -> None:
    queries, keys, width = heads
    q, k = empty(tokens, queries, width, dtype=dtype), empty(tokens, keys, width, dtype=dtype)
    layout = [empty(n, dtype=torch.int32) for n in (SEGMENTS + 1, 1, 1, SEGMENTS)]
    layout.append(shared_prefix_attention._make_lists(q, k, *layout, 1024, 1024, None))
    out, lse = shared_prefix_attention._forward(q, k, k, *layout, width**-0.5)
    shared_prefix_attention._backward(out, q, k, k, out, lse, *layout, width**-0.5)


def forms() -> list[Form]:
    found = []
    for name, dtype in DTYPES.items():
        for label, heads in HEADS.items():
            if name != "fp16" or label == "32+8x128":
                run = partial(attention, dtype=dtype, heads=heads)
                found.append(Form(f"{name} {label}", run, TOKENS, everyday=(name, label) == ("bf16", "32+8x128")))
    return found
