"""How often the output matrix is gone through: 2 N H V of work is one pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast.ops import linear_logprob, linear_policy_loss

N, H, V = 24, 8, 40
CU_SEQLENS = torch.tensor([0, 9, N], dtype=torch.int32)


class Passes(TorchDispatchMode):
    """Counts the work of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1] / (N * H * V)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden", "both"])
@pytest.mark.parametrize("op", ["logits", "recompute", "policy loss", "gspo"])
def test_passes(op, frozen, generator):
    hidden, weight = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    target, old_logp = torch.randint(0, V, (N,), generator=generator), torch.full((N,), -3.0)
    with Passes() as passes:
        if op in ("logits", "recompute"):
            loss = linear_logprob(hidden, weight, target, save=op).logp.sum()
        else:
            loss, _ = linear_policy_loss(
                hidden, weight, target, torch.ones(2), CU_SEQLENS, old_logp=old_logp,
                loss="gspo" if op == "gspo" else "grpo",
            )  # fmt: skip
        if frozen != "both":
            loss.backward()
    learns = {"nothing": 2, "weight": 1, "hidden": 1, "both": 0}[frozen]
    again = 1 if op == "recompute" and learns else 0
    assert passes.count == pytest.approx(1 + again + learns)
