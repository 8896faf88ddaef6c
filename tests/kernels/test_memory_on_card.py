"""What the head needs on a card beyond inputs and gradients, at the shapes of the 4B policy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob, linear_policy_loss
from prism_fast.ops.budgets import WAVE_BYTES, WAVE_BYTES_LARGE, _large

N, H, V = 8192, 2560, 151936
GRADIENTS = 2 * H * (N + V)


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    hidden, weight = noise(N, H).requires_grad_(), (noise(V, H) * 0.04).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator, device="cuda")


def peak(run) -> int:
    """Bytes at the highest point, the first call's compilation left out."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_saved_logits():
    hidden, weight, target = operands()

    def run():
        found = linear_logprob(hidden, weight, target, entropy=True, save="logits")
        torch.autograd.grad((found.logp.sum() + found.entropy.sum()), (hidden, weight))

    assert peak(run) - GRADIENTS <= 2.75e9


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_policy_loss_into_a_gradient_buffer(loss):
    """The float32 matrix that collects the weight's gradient is the trainer's; without it the op brings its own."""
    hidden, weight, target = operands()
    borders = list(range(0, N + 1, 512))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cuda")
    advantage = torch.linspace(-1, 1, len(borders) - 1, device="cuda")
    old_logp = torch.full((N,), -12.0, device="cuda")
    bank = torch.zeros((V, H), device="cuda")

    def run():
        value, _ = linear_policy_loss(
            hidden, weight, target, advantage, cu_seqlens, old_logp=old_logp, loss=loss, borders=borders,
            weight_grad_out=bank,
        )  # fmt: skip
        torch.autograd.grad(value, hidden)

    wave = WAVE_BYTES_LARGE if _large(hidden.device) else WAVE_BYTES
    assert peak(run) - 2 * N * H <= 0.1e9 + 1.1 * wave
