"""What an eager call of the compiled losses costs in torch operators, and that its shortcuts change nothing."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast import ops
from prism_fast.ops import checks, native
from prism_fast.ops.policy_loss import policy_loss

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native import group_advantage as compiled_advantage
from prism_fast.ops.native import policy_loss as compiled_loss

public = sys.modules[policy_loss.__module__]

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
    calls = []
    settled = public._settled

    def counting(*options):
        aggregation, eager = settled(*options)
        return aggregation, lambda *tensors: (calls.append(1), eager(*tensors))[1]

    monkeypatch.setattr(public, "_settled", counting)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (9, 21))
    for backend in (None, "reference"):
        ops.linear_policy_loss(
            hidden, weight, torch.arange(9), torch.ones(3), CU_SEQLENS, backend=backend
        )[0].backward()  # fmt: skip
        assert len(calls) == 2, backend  # one wave and the whole; the reference has its own


def test_what_the_kernels_read_as_it_is(generator):
    """Tensors that fit are not looked at again, so nothing may fit that a check would refuse or a kernel misread."""
    eager = compiled_loss.eager("grpo", (0.2, 0.2), None, None, (1.0, 1.05), "token_mean", True, "k3", 0.0, 0.0)
    wide = lambda n: torch.randn(n, generator=generator)  # noqa: E731
    good = dict(
        logp=wide(9), entropy=wide(9), advantage=wide(3), cu_seqlens=CU_SEQLENS, old_logp=wide(9),
        token_advantage=wide(9), ref_logp=wide(9), is_weight=wide(9), mask=wide(9) > 0, denominator=torch.tensor(3),
        norm_length=torch.tensor(3.0),
    )  # fmt: skip
    fits = lambda **changed: eager(*(good | changed).values(), False, 1) is not None  # noqa: E731
    assert fits() and fits(mask=wide(9), denominator=0.0, norm_length=1) and fits(logp=torch.nn.Parameter(wide(9)))
    assert fits(entropy=None, **{name: None for name in list(good)[4:]})

    class Marked(torch.Tensor):
        pass

    columns = [name for name in good if good[name] is not None and good[name].dim() == 1]
    for name in columns:
        x = good[name]
        other = torch.float64 if x.is_floating_point() else torch.int64
        twice = torch.stack((x, x), 1)
        bad = (x[:-1], x[:, None], x.to(other), twice[:, 0], x.to("meta"), x.as_subclass(Marked), x.tolist(), x[0])
        for i, value in enumerate(bad):
            if not (name == "cu_seqlens" and i == 0):  # fewer sequences: then the advantages do not fit
                assert not fits(**{name: value}), (name, value)
    for name in ("logp", "cu_seqlens"):
        assert not fits(**{name: None})
    assert not fits(cu_seqlens=CU_SEQLENS[:0], advantage=None) and not fits(cu_seqlens=CU_SEQLENS[:-1])
    for value in (-1.0, math.nan, math.inf, True, "3", torch.tensor([3]), torch.tensor(3.0).half(), 10**400):
        assert not fits(denominator=value) and not fits(norm_length=value), value
    assert not fits(norm_length=0.0)
    scores = dict(
        scores=wide(12).view(6, 2), group=GROUP, weights=WEIGHTS, valid=VALID, gate=wide(6), offset=wide(6)
    )  # fmt: skip
    eager_advantage = compiled_advantage.eager("per_score", 1e-6, "below_min", 0.0, "zero", 1.0, False)
    fits = lambda **changed: eager_advantage(*(scores | changed).values(), 1) is not None  # noqa: E731
    assert fits() and fits(scores=wide(12).view(2, 6).T, valid=None, gate=None, offset=None)
    for name, x in scores.items():
        other = torch.float64 if x.is_floating_point() else torch.int32
        bad = (x[:-1], x[None], x.to(other), x.to("meta"), x.as_subclass(Marked), x.tolist())
        for value in bad:
            assert not fits(**{name: value}), (name, value)
    assert not fits(group=None) and not fits(weights=None)


def test_tensors_that_do_not_fit_give_the_same(generator):
    """Strides, other types, subclasses and numbers that are no floats are brought into form first."""

    class Marked(torch.Tensor):
        pass

    logp, advantage, old = -torch.rand(9, generator=generator), torch.ones(3), -torch.rand(9, generator=generator)
    wanted = policy_loss(logp, advantage, CU_SEQLENS, old_logp=old, denominator=3.0, backend="native")[0]
    strided = torch.stack((old, old), 1)[:, 0]
    for given in (
        (logp, advantage, CU_SEQLENS, strided, 3.0), (logp, advantage.double(), CU_SEQLENS, old.double(), 3.0),
        (logp.as_subclass(Marked), advantage, CU_SEQLENS, old, torch.tensor(3)),
        (logp, advantage.as_subclass(Marked), CU_SEQLENS, old.as_subclass(Marked), torch.tensor(3.0).half()),
        (logp, advantage, torch.stack((CU_SEQLENS, CU_SEQLENS), 1)[:, 0], old, torch.tensor(3.0).as_subclass(Marked)),
    ):  # fmt: skip
        found = policy_loss(*given[:3], old_logp=given[3], denominator=given[4], backend="native")[0]
        assert torch.equal(torch.Tensor(found), wanted)
    advantage = ops.group_advantage(SCORES, GROUP, weights=WEIGHTS, valid=VALID, backend="native")
    for given in (
        (SCORES, GROUP.int(), WEIGHTS), (SCORES, GROUP, WEIGHTS.tolist()), (SCORES, GROUP, WEIGHTS.double()),
        (SCORES.as_subclass(Marked), GROUP, WEIGHTS), (SCORES, GROUP.as_subclass(Marked), WEIGHTS),
    ):  # fmt: skip
        found = ops.group_advantage(*given[:2], weights=given[2], valid=VALID, backend="native")
        assert torch.equal(torch.Tensor(found), advantage)


def test_transforms_of_functorch_are_refused():
    """Their tensors have no memory to read."""
    with pytest.raises(RuntimeError, match="cannot read these tensors|functorch transforms"):
        torch.func.grad(lambda x: policy_loss(x, torch.ones(3), CU_SEQLENS, backend="native")[0])(-torch.rand(9))
