"""Whichever threads come first, the compiled ops give the same bits."""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops
from prism_fast.ops import native

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def flat(*found) -> list[torch.Tensor]:
    """All tensors in nested tuples."""
    return [x for part in found for x in (flat(*part) if isinstance(part, tuple | list) else [part]) if x is not None]


def gradients(outputs: list[torch.Tensor], *sources: torch.Tensor) -> list[torch.Tensor]:
    outputs = [x for x in outputs if x.requires_grad]
    return list(torch.autograd.grad(outputs, sources, [torch.full_like(x, 0.7) for x in outputs]))


def advantage(generator, device):
    scores = torch.randn(90, 2, generator=generator).to(device)
    group = torch.randint(0, 9, (90,), generator=generator).to(device)
    valid = (torch.rand(90, generator=generator) < 0.7).to(device)
    return lambda: [
        ops.group_advantage(
            scores, group, weights=torch.ones(2, device=device), valid=valid, normalize=how, backend="native"
        )
        for how in ("per_score", "batch")
    ]  # fmt: skip


def loss_of_policy(generator, device):
    lengths = torch.tensor([0, 5, 5, 300, 301, 340, 600, 640, 641])
    logp, old, ref, entropy = (-torch.rand(645, generator=generator).to(device) for _ in range(4))
    logp.requires_grad_()
    wanted = torch.randn(8, generator=generator).to(device)
    offsets = lengths.to(device, torch.int32)

    def call():
        found = [
            ops.policy_loss(
                logp, wanted, offsets, old_logp=old, ref_logp=ref, entropy=entropy, kl_coef=0.1, loss=loss,
                backend="native",
            )
            for loss in ("grpo", "gspo")
        ]  # fmt: skip
        return found, gradients([x[0] for x in found], logp)

    return call


def loss_of_pairs(generator, device):
    teacher, student = (torch.randn(n, 2, generator=generator).to(device).requires_grad_() for n in (20, 70))
    group = torch.randint(0, 20, (70,), generator=generator).to(device)

    def call():
        found = ops.pairwise_loss(teacher, student, group, l2=0.1, spread=0.1, backend="native")
        return found, gradients(found[:1], teacher, student)

    return call


def logprob(generator, device):
    logits = torch.randn(9, 3001, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, 3001, (9,), generator=generator).to(device)

    def call():
        found = ops.selected_logprob(logits, target, entropy=True, backend="native")
        return found, gradients([found.logp, found.entropy], logits)

    return call


def routing(rows, experts, top_k):
    def make(generator, device):
        logits = torch.randn(rows, experts, generator=generator).to(device).requires_grad_()

        def call():
            found = ops.route_experts(logits, top_k, backend="native")
            plan = ops.plan_experts(found.experts, found.weights.detach(), experts, backend="native")
            return found, [x for x in plan if x.numel()], gradients(list(found), logits)

        return call

    return make


CALLS = {
    "group_advantage": advantage, "policy_loss": loss_of_policy, "pairwise_loss": loss_of_pairs,
    "selected_logprob": logprob, "one expert each": routing(70, 5, 1), "several chunks": routing(2000, 33, 5),
    "wide rows": routing(300, 256, 8), "many rows": routing(1300, 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_give_the_same_bits(name, device, generator):
    call = CALLS[name](generator, device)
    first = [x.detach().clone() for x in flat(call())]
    for _ in range(2):
        again = flat(call())
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))
