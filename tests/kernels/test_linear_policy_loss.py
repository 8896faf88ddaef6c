"""linear_policy_loss over the Triton kernels against the reference in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_policy_loss
from tests.kernels.logprob_cases import inputs, small_tiles, within_contract  # noqa: F401
from tests.support.triton_device import DEVICE

LENGTHS = (50, 0, 13, 7)
OFFSETS = [0, 50, 50, 63, 70]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_loss_and_gradients(loss, dtype, generator):
    hidden, weight, _, target = inputs(generator, dtype=dtype)
    target[4] = -100
    cu_seqlens = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    advantage, old_logp = torch.randn(4, generator=generator).to(DEVICE), None
    options = {"loss": loss, "entropy_coef": 0.1, "borders": OFFSETS, "temperature": 0.8}
    results = []
    for kind, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "triton")):
        operands = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        if old_logp is None:  # near the policy, or the ratios of sequences are clipped
            old_logp = linear_policy_logp(*operands, target).float() + 1e-4 * torch.randn(70, generator=generator).to(
                DEVICE
            )
        found, stats = linear_policy_loss(
            *operands, target, advantage.to(kind), cu_seqlens, old_logp=old_logp.to(torch.float64), backend=backend,
            **options,
        )  # fmt: skip
        results.append((found.detach()[None], *torch.autograd.grad(found, operands), stats.entropy[None]))
    for exact, usual, ours in zip(*results, strict=True):
        within_contract(ours, usual, exact, dtype, 2.0)


def linear_policy_logp(hidden, weight, target):
    full = torch.log_softmax(hidden.detach() @ weight.detach().t() / 0.8, -1)
    return full.gather(1, target.clamp(min=0)[:, None])[:, 0]


def test_weight_gradient_goes_straight_into_a_float32_buffer(generator):
    hidden, weight, _, target = inputs(generator, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    advantage = torch.randn(4, generator=generator).to(DEVICE)
    plain, _ = linear_policy_loss(hidden, weight, target, advantage, cu_seqlens, backend="triton")
    wanted = torch.autograd.grad(plain, (hidden, weight))
    bank = torch.zeros(weight.shape, device=DEVICE)
    loss, _ = linear_policy_loss(hidden, weight, target, advantage, cu_seqlens, weight_grad_out=bank, backend="triton")
    loss.backward()
    assert weight.grad is None and hidden.grad.equal(wanted[0]) and bank.bfloat16().equal(wanted[1])


@pytest.mark.gpu
def test_sequence_ratios_ask_for_borders_on_a_gpu(generator):
    hidden, weight, _, target = inputs(generator)
    cu_seqlens = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="would synchronise; pass borders="):
        linear_policy_loss(
            hidden, weight, target, torch.ones(4, device=DEVICE), cu_seqlens, loss="gspo",
            old_logp=torch.zeros(70, device=DEVICE),
        )  # fmt: skip
