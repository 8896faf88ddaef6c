"""The output head: log-probabilities kept for backward, formed again, in waves with gradients, or statistics alone."""

from __future__ import annotations

from functools import partial

import torch

from prism_fast.ops.triton import linear_logprob
from prism_fast.ops.triton.head import Rows
from tests.kernels.forms import DTYPES, Form, empty

VOCABULARY = 151_936
WIDTHS = (2048, 2560, 4096)
MANY = (8192, 8191, 1000)  # rows of one micro-batch
FEW = (32, 7, 1)


def operands(n: int, width: int, dtype: torch.dtype, ban: bool, vocabulary: int) -> tuple:
    """(hidden, weight, bias or None, target); temperature is a number or one per row."""
    bias = empty(vocabulary, dtype=dtype) if ban else None
    return empty(n, width, dtype=dtype), empty(vocabulary, width, dtype=dtype), bias, empty(n, dtype=torch.int64)


def logprob(
    n: int,
    *,
    dtype: torch.dtype,
    save: bool = True,
    ban: bool = False,
    entropy: bool = False,
    softcap: float | None = None,
    learns: bool = True,
    widths: tuple[int, ...] = WIDTHS,
    vocabulary: int = VOCABULARY,
) -> None:
    """`linear_logprob`, forward and backward, at every width; one temperature and one per row are the same form."""
    for width in widths:
        hidden, weight, bias, target = operands(n, width, dtype, ban, vocabulary)
        for temperature in (empty(1), empty(n)):
            arguments = (hidden, weight, bias, target, temperature)
            *found, kept, tile_max = linear_logprob._run(*arguments, None, softcap, entropy, -100, save and learns)
            if learns:
                upstream = (empty(n), empty(n) if entropy else None)
                saved = (*found, kept if save else None, tile_max)
                wants = (True, True, ban)
                linear_logprob._run_backward(*upstream, *arguments, *saved, None, softcap, -100, *wants)


def waves(n: int, *, dtype: torch.dtype, ban: bool, entropy: bool, apart: bool = False) -> None:
    """The steps of `linear_policy_loss` and, ``apart``, of `linear_cross_entropy` with a z-loss: scores and gradients
    wave after wave, the weight's gradient added up."""
    for width in WIDTHS:
        hidden, weight, bias, target = operands(n, width, dtype, ban, VOCABULARY)
        rows = Rows(hidden, weight, bias, target, empty(1), None, entropy)
        rows.prepare((True, True, False), empty(VOCABULARY, width))
        for block in (slice(0, n // 2), slice(n // 2, n)):
            found = rows.forward(block, keep=True)
            size = block.stop - block.start
            more = (empty(size), empty(size)) if apart else None
            rows.backward(block, found, empty(size), empty(size) if entropy else None, more)
        rows.gradients(with_weight=False)


def forms() -> list[Form]:
    found = []
    for name, dtype in DTYPES.items():
        call = partial(logprob, dtype=dtype)
        found += [
            Form(f"{name} keep", call, MANY),
            Form(f"{name} keep ban entropy", partial(call, ban=True, entropy=True), MANY),
            Form(f"{name} few rows ban entropy", partial(call, ban=True, entropy=True), FEW),
        ]
        if name != "fp16":
            found += [
                Form(f"{name} keep softcap", partial(call, softcap=30.0), MANY),
                Form(f"{name} keep ban entropy softcap", partial(call, ban=True, entropy=True, softcap=30.0), MANY),
                Form(f"{name} recompute ban entropy", partial(call, save=False, ban=True, entropy=True), MANY),
                Form(f"{name} waves ban entropy", partial(waves, dtype=dtype, ban=True, entropy=True), MANY),
                Form(f"{name} waves z-loss", partial(waves, dtype=dtype, ban=False, entropy=False, apart=True), MANY),
                # The built-in example.
                Form(f"{name} digits", partial(call, ban=True, entropy=True, widths=(128,), vocabulary=2048), FEW),
            ]
        if name == "bf16":
            found += [
                Form(f"{name} keep entropy", partial(call, entropy=True), MANY),
                Form(f"{name} keep ban", partial(call, ban=True), MANY),
                Form(f"{name} recompute", partial(call, save=False), MANY),
                Form(f"{name} statistics ban entropy", partial(call, learns=False, ban=True, entropy=True), MANY),
                Form(f"{name} few rows", call, FEW),
                Form(f"{name} waves ban", partial(waves, dtype=dtype, ban=True, entropy=False), MANY),
            ]
    learns = (
        "keep",
        "keep ban entropy",
        "few rows ban entropy",
        "recompute ban entropy",
        "waves ban entropy",
        "waves z-loss",
    )
    return [f._replace(everyday=f.name in {f"bf16 {name}" for name in learns}) for f in found]
