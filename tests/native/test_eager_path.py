"""What an eager call of the compiled losses costs in torch operators, and that its shortcuts change nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast import ops
from prism_fast.ops import checks, native
from prism_fast.ops.policy_loss import policy_loss

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

CU_SEQLENS = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
SCORES, GROUP, WEIGHTS = torch.randn(6, 2), torch.arange(6) // 3, torch.ones(2)
VALID = torch.tensor([True, True, False] * 2)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def operators(call) -> list[str]:
    call()
    with Counted() as mode:
        call()
    return sorted(mode.names)


def test_torch_operators_per_call():
    """Results are allocated, the statistics are taken apart; everything else is one call into the module."""
    advantage = lambda: ops.group_advantage(SCORES, GROUP, weights=WEIGHTS, valid=VALID, backend="native")  # noqa: E731
    assert operators(advantage) == ["new_empty"]
    logp = -torch.rand(9).requires_grad_()
    leaf, old, sequence = logp.detach().requires_grad_(), logp.detach(), torch.ones(3)

    def forward():
        return policy_loss(leaf, sequence, CU_SEQLENS, old_logp=old, entropy=old, backend="native")[0]

    assert operators(forward) == ["empty_like", "new_empty", "new_empty", "unbind.int"]
    loss = forward()
    # Upstream is 1: what the forward pass wrote is the gradient. The first operator is the engine's own.
    assert operators(lambda: torch.autograd.grad(loss, leaf, retain_graph=True)) == ["ones_like"]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_that_are_passed_on_uncopied_are_safe(accumulate, entropy_coef, generator):
    """However often backward is called, into whatever, each call adds the same."""
    logp, entropy = (-torch.rand(9, generator=generator).requires_grad_() for _ in range(2))
    leaves = [x.detach().requires_grad_() for x in (logp, entropy)]
    inputs = [x * 1.0 for x in leaves] if not accumulate else leaves
    loss, _ = policy_loss(
        inputs[0], torch.randn(3, generator=generator), CU_SEQLENS, old_logp=logp.detach(), entropy=inputs[1],
        entropy_coef=entropy_coef, backend="native",
    )  # fmt: skip
    (once,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    once = once.clone()
    for times in (1, 2, 3, 4):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaves[0].grad, times * once)
    loss.backward()
    torch.testing.assert_close(leaves[0].grad, 5 * once)


def test_who_changes_a_gradient_in_place_is_told():
    leaf = -torch.rand(9).requires_grad_()
    leaf = leaf.detach().requires_grad_()
    loss, _ = policy_loss(leaf, torch.ones(3), CU_SEQLENS, old_logp=leaf.detach() - 0.1, backend="native")
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    gradient.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_options_are_checked_once_and_refused_each_time(monkeypatch):
    calls = []

    @checks.once
    def check(value):
        calls.append(value)
        if value == [2] or value == 2:
            raise ValueError(f"bad {value}")
        return "good"

    assert [check(1), check(1), check([1]), check([1])] == ["good"] * 4
    assert calls == [1, [1], [1]]  # what cannot be remembered is looked at each time
    check(1.0)
    assert calls[-1] == 1.0 and isinstance(calls[-1], float)  # another type is another value
    for _ in range(2):
        with pytest.raises(ValueError, match="bad 2"):
            check(2)
        with pytest.raises(ValueError, match="clip must be a pair"):
            policy_loss(torch.zeros(9), torch.ones(3), CU_SEQLENS, clip=[0.1])
    logp = torch.zeros(9)
    assert policy_loss(logp, torch.ones(3), CU_SEQLENS, clip=[0.1, 0.2])[0] == policy_loss(
        logp, torch.ones(3), CU_SEQLENS, clip=(0.1, 0.2)
    )[0]  # fmt: skip


def test_waves_use_the_compiled_policy_loss(monkeypatch, generator):
    """linear_policy_loss asks for it in every wave, whatever computes the head."""
    from prism_fast.ops.native import policy_loss as compiled

    calls = []
    run = compiled.run
    monkeypatch.setattr(compiled, "run", lambda *a, **k: (calls.append(1), run(*a, **k))[1])
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (9, 21))
    for backend in (None, "reference"):
        ops.linear_policy_loss(
            hidden, weight, torch.arange(9), torch.ones(3), CU_SEQLENS, backend=backend
        )[0].backward()  # fmt: skip
        assert len(calls) == 2, backend  # one wave and the whole; the reference has its own
