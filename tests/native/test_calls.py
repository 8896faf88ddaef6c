"""How tensors and gradients pass between torch and the compiled kernels, whatever the kernels compute."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast import ops
from prism_fast.ops import native, policy_loss

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

    assert operators(forward) == ["new_empty"] * 3 + ["unbind.int"]
    loss = forward()
    # Upstream is 1: what the forward pass wrote is the gradient. The first operator is the engine's own.
    assert set(operators(lambda: torch.autograd.grad(loss, leaf, retain_graph=True))) <= {"ones_like", "detach"}


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
    leaf = -torch.rand(9)
    leaf.requires_grad_()
    loss, _ = policy_loss(leaf, torch.ones(3), CU_SEQLENS, old_logp=leaf.detach() - 0.1, backend="native")
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    gradient.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_tensors_of_other_forms_give_the_same(generator):
    """Strides, other types, subclasses and numbers that are no floats are brought into form first."""

    class Marked(torch.Tensor):
        pass

    logp, advantage, old = -torch.rand(9, generator=generator), torch.ones(3), -torch.rand(9, generator=generator)
    wanted = policy_loss(logp, advantage, CU_SEQLENS, old_logp=old, denominator=3.0, backend="native")[0]
    strided = torch.stack((old, old), 1)[:, 0]
    for given in (
        (logp, advantage, CU_SEQLENS, strided, 3.0), (logp, advantage.double(), CU_SEQLENS, old.double(), 3.0),
        (torch.stack((logp, logp), 1)[:, 1], advantage, CU_SEQLENS, old, 3), (logp, advantage, CU_SEQLENS, old, 3),
        (logp.as_subclass(Marked), advantage, CU_SEQLENS, old, torch.tensor(3)),
        (logp, advantage.as_subclass(Marked), CU_SEQLENS, old.as_subclass(Marked), torch.tensor(3.0).half()),
        (logp, advantage, torch.stack((CU_SEQLENS, CU_SEQLENS), 1)[:, 0], old, torch.tensor(3.0).as_subclass(Marked)),
    ):  # fmt: skip
        found = policy_loss(*given[:3], old_logp=given[3], denominator=given[4], backend="native")[0]
        assert torch.equal(torch.Tensor(found), wanted)
    advantage = ops.group_advantage(SCORES, GROUP, weights=WEIGHTS, valid=VALID, backend="native")
    for given in (
        (SCORES, GROUP.int(), WEIGHTS), (SCORES, GROUP, WEIGHTS.tolist()), (SCORES, GROUP, WEIGHTS.double()),
        (SCORES.t().contiguous().t(), GROUP, WEIGHTS), (SCORES.as_subclass(Marked), GROUP, WEIGHTS),
        (SCORES, GROUP.as_subclass(Marked), WEIGHTS),
    ):  # fmt: skip
        found = ops.group_advantage(*given[:2], weights=given[2], valid=VALID, backend="native")
        assert torch.equal(torch.Tensor(found), advantage)


def losses() -> dict:
    """name -> the op as a function of the one tensor that has a gradient, with a shape for it."""
    return {
        "policy_loss": (lambda x: policy_loss(x, torch.ones(3), CU_SEQLENS, backend="native")[0], (9,)),
        "selected_logprob": (lambda x: ops.selected_logprob(x, torch.arange(3), backend="native").logp.sum(), (3, 5)),
        "pairwise_loss": (
            lambda x: ops.pairwise_loss(x, torch.ones(4, 2), torch.arange(4) // 2, backend="native")[0], (2, 2)
        ),
        "linear_logprob": (lambda x: ops.linear_logprob(x, torch.ones(7, 5), torch.arange(3)).logp.sum(), (3, 5)),
    }  # fmt: skip


@pytest.mark.parametrize("name", losses())
def test_derivatives_that_kernels_would_drop_are_refused(name):
    """Forward-mode duals and transforms of torch.func: their tensors carry more than the numbers that kernels read."""
    function, shape = losses()[name]
    x = -torch.rand(shape)
    message = f"{name}: backend=.*forward-mode.*; (pass backend='reference'|no other backend has)"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(x, torch.ones(shape)))
    for transform, given in ((torch.func.grad, x), (torch.func.jacfwd, x), (torch.func.vmap, torch.stack((x, x)))):
        with pytest.raises(NotImplementedError, match=f"{name}.*torch.func"):
            transform(function)(given)
    function(x)  # and nothing stays behind


def test_the_reference_of_the_losses_has_forward_derivatives():
    x, tangent = -torch.rand(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    run = lambda x: policy_loss(x, torch.ones(3), CU_SEQLENS, backend="reference")[0]  # noqa: E731
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, torch.autograd.functional.jvp(run, x, tangent)[1])


def test_advantages_under_a_transform_are_refused():
    with pytest.raises(NotImplementedError, match="group_advantage: .*torch.func"):
        torch.func.vmap(lambda s: ops.group_advantage(s, GROUP, weights=WEIGHTS, backend="native"))(SCORES[None])
