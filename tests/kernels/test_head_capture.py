"""The head on a card never makes the host wait, and can be captured in a CUDA graph with its backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob, linear_policy_loss

N, H, V = 300, 64, 1000
BORDERS = [0, 100, 100, 260, N]


def logprob(x: dict[str, torch.Tensor], **options) -> torch.Tensor:
    found = linear_logprob(x["hidden"], x["weight"], x["target"], temperature=x["temperature"], entropy=True, **options)
    return (found.logp * x["g"]).sum() + found.entropy.sum()


def policy(x: dict[str, torch.Tensor], **options) -> torch.Tensor:
    loss, _ = linear_policy_loss(
        x["hidden"], x["weight"], x["target"], x["advantage"], x["cu_seqlens"], old_logp=x["old_logp"], borders=BORDERS,
        entropy_coef=0.1, **options,
    )  # fmt: skip
    return loss


CALLS = {
    "logits": partial(logprob, save="logits"),
    "recompute": partial(logprob, save="recompute"),
    "grpo": policy,
    "gspo": partial(policy, loss="gspo"),
}


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    target = torch.randint(0, V, (N,), generator=generator)
    target[seed::7] = -100
    g = noise(N)
    g[seed::3] = 0.0
    found = {
        "hidden": noise(N, H).bfloat16(), "weight": noise(V, H).bfloat16(), "target": target, "g": g,
        "temperature": noise(N).abs() + 0.5, "advantage": noise(4), "old_logp": noise(N) * 0.1 - 7.0,
        "cu_seqlens": torch.tensor(BORDERS, dtype=torch.int32),
    }  # fmt: skip
    return {name: value.cuda().requires_grad_(name in ("hidden", "weight")) for name, value in found.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_no_synchronisation_and_capture(name):
    def step(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = CALLS[name](x)
        return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["weight"]))

    x, other = inputs(1), inputs(2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    with torch.no_grad():
        for key, value in x.items():
            value.copy_(other[key])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(other), strict=True))
