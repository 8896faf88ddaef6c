"""Output head: log-probabilities, cross entropy, policy loss from hidden states. Shapes: rows x width x vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prism_fast import ops

from . import rivals
from .op import Inputs, Op, Provider, require

SHAPES = {
    "cuda": ((8192, 2560, 151936), (8192, 4096, 151936)),
    "cpu": ((2048, 512, 32768),),
    "small": ((128, 32, 500),),
}
SEQUENCES = 4
CHUNK = 1024


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """Hidden states [N, H] and weight [V, H] whose scores differ by a few nats; four sequences of equal length."""
    n, h, v = shape
    generator = torch.Generator(device).manual_seed(n + h + v)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    return {
        "hidden": noise(n, h).to(dtype).requires_grad_(),
        "weight": (noise(v, h) * (2.0 / h**0.5)).to(dtype).requires_grad_(),
        "target": torch.randint(0, v, (n,), generator=generator, device=device),
        "upstream": noise(n),
        "upstream_entropy": noise(n),
        "advantage": noise(SEQUENCES),
        "old_logp": noise(n) * 0.1 - 10.0,
        "cu_seqlens": torch.linspace(0, n, SEQUENCES + 1, device=device).to(torch.int32),
    }


def materialised(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    logits = torch.nn.functional.linear(x["hidden"], x["weight"]).float()
    every = torch.log_softmax(logits, -1)
    logp = every.gather(1, x["target"][:, None])[:, 0]
    return (logp, -(every.exp() * every).sum(-1)) if entropy else (logp,)


def chunked(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    """Slices of rows, each computed again in backward, as trainers do in plain PyTorch."""

    def part(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return materialised({"hidden": hidden, "weight": weight, "target": target}, entropy)

    rows = zip(x["hidden"].split(CHUNK), x["target"].split(CHUNK), strict=True)
    parts = [checkpoint(part, h, x["weight"], t, use_reentrant=False) for h, t in rows]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


_compiled: dict[bool, Callable] = {}


def compiled(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    if entropy not in _compiled:
        _compiled[entropy] = torch.compile(materialised, dynamic=False)
    return _compiled[entropy](x, entropy)


def ours(backend: str, save: str) -> Callable[[Inputs, bool], tuple[Tensor, ...]]:
    def run(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
        require(backend, x["hidden"])
        found = ops.linear_logprob(x["hidden"], x["weight"], x["target"], entropy=entropy, save=save, backend=backend)
        return found if entropy else found[:1]

    return run


LOGPROB: dict[str, Callable[[Inputs, bool], tuple[Tensor, ...]]] = {
    "eager": materialised,
    "chunked": chunked,
    "torch.compile": compiled,
    "liger scaled ce": rivals.liger_scaled,
    "cut cross entropy": rivals.cut_cross_entropy,
    "verl triton": rivals.verl_triton,
    "trl chunked": rivals.trl_chunked,
    "prism_fast triton logits": ours("triton", "logits"),
    "prism_fast triton recompute": ours("triton", "recompute"),
    "prism_fast reference logits": ours("reference", "logits"),
    "prism_fast reference recompute": ours("reference", "recompute"),
}


def cross_entropy(logp: Callable[[Inputs, bool], tuple[Tensor, ...]]) -> Provider:
    return lambda x: (-logp(x, False)[0].mean(),)


def ours_cross_entropy(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["hidden"])
        return (ops.linear_cross_entropy(x["hidden"], x["weight"], x["target"], backend=backend),)

    return run


def policy(x: Inputs, logp: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    kind = logp.dtype
    loss, _ = ops.policy_loss(
        logp, x["advantage"].to(kind), x["cu_seqlens"], old_logp=x["old_logp"].to(kind), backend=backend
    )
    return (loss,)


def policy_of(logp: Callable[[Inputs, bool], tuple[Tensor, ...]]) -> Provider:
    """The same loss for every provider of log-probabilities."""
    return lambda x: policy(x, logp(x, False)[0])


def ours_policy(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        require(backend, x["hidden"])
        loss, _ = ops.linear_policy_loss(
            x["hidden"], x["weight"], x["target"], x["advantage"], x["cu_seqlens"], old_logp=x["old_logp"],
            backend=backend,
        )  # fmt: skip
        return (loss,)

    return run


def exact_logp(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    """The specification in float64, in waves of rows, so that it fits a card's memory beside the operands."""
    found = ops.linear_logprob(
        x["hidden"], x["weight"], x["target"], entropy=entropy, save="recompute", backend="reference"
    )
    return found if entropy else found[:1]


def flop(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """One product of forward, two of backward."""
    n, h, v = shape
    return 2.0 * n * h * v * {"inference": 1, "forward": 1, "backward": 2, "full": 3}[mode]


def _op(name: str, exact: Provider, providers: dict[str, Provider], upstream: tuple[str, ...] = ()) -> Op:
    return Op(name, SHAPES, inputs, exact, providers, ("hidden", "weight"), "TFLOP/s", flop, upstream)


OPS = (
    _op(
        "linear_logprob",
        lambda x: exact_logp(x, False),
        {name: partial(f, entropy=False) for name, f in LOGPROB.items()},
        ("upstream",),
    ),
    _op(
        "linear_logprob_entropy",
        lambda x: exact_logp(x, True),
        {name: partial(f, entropy=True) for name, f in LOGPROB.items()},
        ("upstream", "upstream_entropy"),
    ),
    _op(
        "linear_cross_entropy",
        cross_entropy(exact_logp),
        {
            "eager": cross_entropy(materialised),
            "liger": rivals.liger_cross_entropy,
            "cut cross entropy": cross_entropy(rivals.cut_cross_entropy),
            "trl chunked": cross_entropy(rivals.trl_chunked),
            "prism_fast triton": ours_cross_entropy("triton"),
            "prism_fast reference": ours_cross_entropy("reference"),
        },
    ),
    _op(
        "linear_policy_loss",
        lambda x: policy(x, exact_logp(x, False)[0], "reference"),
        {
            "eager": policy_of(materialised),
            "chunked": policy_of(chunked),
            "liger grpo": rivals.liger_grpo,
            "verl triton": policy_of(rivals.verl_triton),
            "trl chunked": policy_of(rivals.trl_chunked),
            "prism_fast triton": ours_policy("triton"),
            "prism_fast reference": ours_policy("reference"),
        },
    ),
)
