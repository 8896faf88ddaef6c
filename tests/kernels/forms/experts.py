"""A layer of experts, forward and backward, by our grouped products and around the library's."""

from __future__ import annotations

from functools import partial

import torch

from prism_fast.ops.stock import moe_experts as stock
from prism_fast.ops.triton import moe_experts as ours
from tests.kernels.forms import DTYPES, Form, empty

# H, I, experts, experts per token: the discriminators, the built-in example, widths that no tile divides.
SHAPES = {
    "E4k2": (2048, 6144, 4, 2),
    "E128k8": (2048, 768, 128, 8),
    "digits": (128, 192, 4, 2),
    "ragged": (2056, 776, 4, 2),
}
TOKENS = (32_768, 16_383, 5)
LIBRARY = (90, 100)  # cards on which the library's grouped products are the default in bfloat16


def layer(
    tokens: int, *, op, dtype: torch.dtype, shape: tuple[int, ...], hub: bool = False, recompute: bool = False
) -> None:
    """``hub``: weights as [E, H, 2I] and [E, I, H] in memory, as the hub stores them."""
    width, inner, experts, top_k = shape
    if hub:
        gate_up, down = empty(experts, width, 2 * inner, dtype=dtype), empty(experts, inner, width, dtype=dtype)
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    else:
        gate_up, down = empty(experts, 2 * inner, width, dtype=dtype), empty(experts, width, inner, dtype=dtype)
    hidden, rows = empty(tokens, width, dtype=dtype), tokens * top_k
    permutation, token = (empty(rows, dtype=kind) for kind in (torch.int64, torch.int32))
    plan = (permutation, token, empty(tokens, top_k, dtype=torch.int32), empty(experts + 1, dtype=torch.int32))
    arguments = (hidden, gate_up, down, empty(tokens, top_k), *plan)
    _, kept = op._forward(*arguments, not recompute)
    op._backward(hidden, *arguments, kept, [True] * 4)


def forms() -> list[Form]:
    """By our products, and around the library's."""
    found = []
    for name, dtype in DTYPES.items():
        for shape, sizes in SHAPES.items():
            if name == "fp16" and shape != "E4k2":
                continue
            call = partial(layer, dtype=dtype, shape=sizes)
            some = [Form(f"{name} {shape}", partial(call, op=ours), TOKENS)]
            if name != "fp16" and shape[0] == "E":
                some.append(Form(f"{name} {shape} recompute", partial(call, op=ours, recompute=True), TOKENS))
                some.append(Form(f"{name} {shape} hub", partial(call, op=ours, hub=True), TOKENS))
            if name == "bf16":
                for hub in (False, True):
                    label = f"{name} {shape} library{' hub' if hub else ''}"
                    some.append(Form(label, partial(call, op=stock, hub=hub), TOKENS, cards=LIBRARY))
            found += some
    everyday = ("bf16 E4k2", "bf16 E4k2 library")
    return [f._replace(everyday=f.name in everyday) for f in found]
