"""Layers of experts for the tests of their backends, and what counts as accurate."""

from __future__ import annotations

import torch

from prism_fast.ops import Routing, moe_experts, plan_experts
from tests.support.triton_device import DEVICE

NAMES = ("out", "hidden", "gate_up", "down", "logits")


def layer(generator, tokens, experts, hidden, inner, dtype):
    """[hidden, gate_up, down, logits]; scaled so that outputs are of order 1."""

    def noise(*shape, scale=1.0):
        x = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).to(DEVICE).requires_grad_()

    return [
        noise(tokens, hidden), noise(experts, 2 * inner, hidden, scale=hidden**-0.5),
        noise(experts, hidden, inner, scale=inner**-0.5), noise(tokens, experts, scale=2.0),
    ]  # fmt: skip


def evaluate(sources, routing: Routing, g, backend, **options) -> dict[str, torch.Tensor]:
    out = moe_experts(*sources[:3], routing, backend=backend, **options)
    gradients = torch.autograd.grad((out * g.to(out.dtype)).sum(), [s for s in sources if s.requires_grad])
    return dict(zip(NAMES, (out, *gradients), strict=True))


def exact(sources, routing, g):
    wide = [s.detach().double().requires_grad_() for s in sources]
    top_k = routing.experts.shape[1]
    weights = wide[3].softmax(-1).gather(1, routing.experts)
    plan = plan_experts(routing.experts, weights / weights.sum(-1, keepdim=True), wide[3].shape[1])
    assert torch.equal(plan.permutation, routing.permutation) and top_k
    return evaluate(wide, plan, g, "reference")


def assert_accurate(found, eager, true) -> None:
    """As accurate as PyTorch's own arithmetic of this dtype, twice its error allowed."""
    for name, value in true.items():
        scale = value.abs().max() if value.numel() else 0.0
        ours, theirs = ((x[name].double() - value).abs().amax() if value.numel() else 0.0 for x in (found, eager))
        assert ours <= 2 * theirs + 4 * torch.finfo(found[name].dtype).eps * scale, (name, ours, theirs)
        assert found[name].dtype == eager[name].dtype and found[name].shape == value.shape
