"""The head's walk through a card's calls, played on the CPU: the products it asks for, and where it launches."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels import launch, logprob
from prism_fast.ops import linear_logprob, linear_policy_loss
from tests.kernels.logprob_cases import inputs, small_tiles, upstream  # noqa: F401
from tests.support import played_card
from tests.support.triton_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="plays a card on the CPU")
N, V, H = 70, 150, 48
WIDE = torch.float32


def named(calls) -> set[tuple]:
    """Without the rows of a wave."""
    return {(c.name, c.out_dtype, "dX" if c.shape[2] == V else "dW") for c in calls}


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_within_the_contract(dtype, save, generator, monkeypatch):
    *operands, target = inputs(generator, dtype=dtype, bias=True)
    g, h = upstream(generator, N)
    calls = played_card.play(monkeypatch)
    monkeypatch.setattr("prism_fast.ops.products.MANY", N * H)  # as if the weight's gradient were a large one
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(
            operands[0], operands[1], target, bias=operands[2], entropy=True, save=save, backend="triton"
        )
    ours = torch.autograd.grad((found.logp * g).sum() + (found.entropy * h).sum(), operands)
    # One wave's weight gradient has its own dtype; of several the first is written and the others are added.
    several = {("mm", WIDE, "dW"), ("addmm", WIDE, "dW")}
    assert named(calls) == {("mm", WIDE, "dX")} | ({("mm", None, "dW")} if save == "logits" else several)
    assert sum(c.name == "addmm" for c in calls) == (0 if save == "logits" else 1)
    monkeypatch.undo()
    small = [x.detach().double().requires_grad_() for x in operands]
    exact = linear_logprob(small[0], small[1], target, bias=small[2], entropy=True, backend="reference")
    wanted = torch.autograd.grad((exact.logp * g).sum() + (exact.entropy * h).sum(), small)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_gradient_buffer_is_added_to(kind, generator, monkeypatch):
    hidden, weight, _, target = inputs(generator, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 50, N], dtype=torch.int32)
    advantage = torch.tensor([1.0, -0.5])
    calls = played_card.play(monkeypatch)
    plain, _ = linear_policy_loss(hidden, weight, target, advantage, cu_seqlens, backend="triton")
    wanted = torch.autograd.grad(plain, (hidden, weight))
    assert named(calls) == {("mm", WIDE, "dX"), ("mm", WIDE, "dW"), ("addmm", WIDE, "dW")}
    calls.clear()
    start = torch.randn(weight.shape, generator=generator).to(kind)
    bank = start.clone()
    loss, _ = linear_policy_loss(hidden, weight, target, advantage, cu_seqlens, weight_grad_out=bank, backend="triton")
    loss.backward()
    assert named(calls) == {("mm", WIDE, "dX"), ("addmm" if kind == WIDE else "mm", WIDE, "dW")}
    assert weight.grad is None and hidden.grad.equal(wanted[0])
    torch.testing.assert_close((bank - start).to(WIDE), wanted[1].to(WIDE), rtol=2**-7, atol=1e-6)


def test_every_launch_is_on_the_card_of_the_tensors(generator, monkeypatch):
    inside, launched = [], []

    @contextmanager
    def on_device(x):
        inside.append(x.shape)
        yield
        inside.pop()

    def guarded(name):
        real = getattr(logprob, name)

        def call(*arguments, **options):
            assert inside, f"{name} outside of on_device"
            launched.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(logprob, name, call)

    monkeypatch.setattr(launch, "on_device", on_device)
    guarded("scores")
    guarded("gradient_")
    hidden, weight, _, target = inputs(generator)
    for save in ("logits", "recompute"):
        linear_logprob(hidden, weight, target, save=save, backend="triton").logp.sum().backward()
    offsets = torch.tensor([0, N], dtype=torch.int32)
    linear_policy_loss(hidden, weight, target, torch.ones(1), offsets, backend="triton")[0].backward()
    assert {launched.count("scores"), launched.count("gradient_")} == {1 + 4 + 2, 1 + 2 + 2}
