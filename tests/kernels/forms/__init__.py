"""Every form in which the trainer, the examples and the benchmarks launch a Triton kernel, at the real shapes.

A new kernel needs a `Form` in the file of its area: a name, and a function that runs the launch code on tensors without
memory (`tests.support.fake_card`). A form runs once per size; the first size decides what is compiled, and another
number of rows must not compile anything anew. What the forms leave out is seen: every launch site and every value of a
kernel's switches has to occur in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.fake_card import DEVICE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AREAS = ("head", "experts", "attention")


class Form(NamedTuple):
    """``run(size)`` launches; ``sizes`` are numbers of rows or tokens."""

    name: str  # begins with its dtype
    run: Callable[[int], None]
    sizes: tuple[int, ...]
    cards: tuple[int, ...] = (80, 90, 100)
    everyday: bool = False  # compiled for sm_90 by `make test`; the others by `make test-long`


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)
