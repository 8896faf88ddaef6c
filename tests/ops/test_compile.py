"""Every public op traces into one graph, forward and backward, and gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops
from prism_fast.ops.reference.linear_logprob import BLOCK_BYTES
from tests.ops.test_shared_prefix_attention import layout_of

LENGTHS = (3, 0, 4, 2)
N, H, V, B = sum(LENGTHS), 5, 13, len(LENGTHS)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def noise(*shape, requires_grad=True):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def whole(count: int, high: int) -> torch.Tensor:
    return torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(count))


def policy(logp, entropy, advantage, old_logp):
    options = {"entropy_coef": 0.1, "ref_logp": old_logp, "kl_coef": 0.1, "dual_clip": 3.0}
    return ops.policy_loss(logp, advantage, CU_SEQLENS, old_logp=old_logp, entropy=entropy, **options)


def cases() -> dict:
    """name -> (function, inputs)."""
    target, group, experts = whole(N, V), whole(B, 2), whole(N, 4)[:, None]
    valid = torch.tensor([True, False, True, True])
    layout = layout_of([(4, -1), (3, 0), (2, 0)])
    return {
        "policy_loss": (policy, (noise(N), noise(N), noise(B), noise(N, requires_grad=False))),
        "linear_logprob": (
            lambda h, w, b: ops.linear_logprob(h, w, target, bias=b, softcap=4.0, entropy=True, save="logits"),
            (noise(N, H), noise(V, H), noise(V)),
        ),
        "linear_policy_loss": (  # also the recomputing form of linear_logprob
            lambda h, w, a: ops.linear_policy_loss(h, w, target, a, CU_SEQLENS, entropy_coef=0.1, loss="gspo"),
            (noise(N, H), noise(V, H), noise(B)),
        ),
        "linear_cross_entropy": (
            lambda h, w, b: ops.linear_cross_entropy(h, w, target, bias=b, label_smoothing=0.1, z_loss=1e-2),
            (noise(N, H), noise(V, H), noise(V)),
        ),
        "selected_logprob": (
            lambda z, t: ops.selected_logprob(z, target, temperature=t, entropy=True),
            (noise(N, V), noise(N, requires_grad=False).abs() + 0.5),
        ),
        "group_advantage": (
            lambda s, w: ops.group_advantage(s, group, weights=w, valid=valid, invalid_penalty=1.5, power=1.5),
            (noise(B, 2), noise(2)),
        ),
        "group_advantage/reference": (
            lambda s, w: ops.group_advantage(s, group, weights=w, valid=valid, backend="reference"),
            (noise(B, 2), noise(2)),
        ),
        "importance_weights": (
            lambda a, b: ops.importance_weights(a, b, CU_SEQLENS, mode="sequence_mask", low=0.5, high=2.0),
            (noise(N), noise(N)),
        ),
        "pairwise_loss": (
            lambda t, s: ops.pairwise_loss(t, s, group, valid=valid, clip=2.0, l2=0.1, spread=0.1),
            (noise(2, 2), noise(B, 2)),
        ),
        "route_experts": (lambda z: ops.route_experts(z, 2), (noise(N, 4),)),
        "plan_experts": (lambda w: ops.plan_experts(experts, w, 4)[:4], (noise(N, 1),)),
        "moe_experts/recompute": (
            lambda x, gate_up, down, z: ops.moe_experts(x, gate_up, down, ops.route_experts(z, 2), recompute=True),
            (noise(N, H), noise(4, 6, H), noise(4, H, 3), noise(N, 4)),
        ),
        "shared_prefix_attention": (
            lambda q, k, v: ops.shared_prefix_attention(q, k, v, layout),
            (noise(N, 4, 6), noise(N, 2, 6), noise(N, 2, 6)),
        ),
    }


def flatten(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]


def evaluate(function, inputs):
    """(results, gradients of a weighted sum of all differentiable results)."""
    results = flatten(function(*inputs))
    sources = [x for x in inputs if x.requires_grad]
    total = sum(((1 + i) * r).sum() for i, r in enumerate(results) if r.requires_grad)
    if not isinstance(total, torch.Tensor):
        return results, []
    return results, list(torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", cases())
def test_fullgraph(name):
    function, inputs = cases()[name]
    torch.compiler.reset()
    wanted = evaluate(function, inputs)
    found = evaluate(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_every_op_is_covered():
    assert {name.split("/")[0] for name in cases()} == set(ops.available())


LENGTHWISE = {  # of n tokens in sequences of n // 2 and the rest
    "linear_logprob/logits": lambda h, w, t, a, c: ops.linear_logprob(h, w, t, entropy=True, save="logits").logp.sum(),
    "linear_logprob/recompute": lambda h, w, t, a, c: ops.linear_logprob(h, w, t, save="recompute").logp.sum(),
    "linear_policy_loss": lambda h, w, t, a, c: ops.linear_policy_loss(h, w, t, a, c, entropy_coef=0.1)[0],
    "group_advantage": lambda h, w, t, a, c: (
        h.sum() + w.sum() + ops.group_advantage(h[:, :2], t, weights=torch.ones(2, dtype=h.dtype)).sum()
    ),
}


@pytest.mark.parametrize("name", LENGTHWISE)
def test_lengths_do_not_recompile(name, monkeypatch):
    """Whatever the number of blocks of rows."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr("prism_fast.ops.reference.linear_logprob.MIN_BLOCK_ROWS", 8)
    torch.compiler.reset()
    compiled = torch.compile(LENGTHWISE[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9, 40):
        inputs = [noise(n, H), noise(V, H), whole(n, 6), noise(2, requires_grad=False)]
        offsets = torch.tensor([0, n // 2, n], dtype=torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=n != 6):
            found = torch.autograd.grad(compiled(*inputs, offsets), inputs[:2])
        wanted = torch.autograd.grad(LENGTHWISE[name](*inputs, offsets), inputs[:2])
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("save", [False, True])
def test_opcheck_of_the_head(save):
    from prism_fast.ops.reference.linear_logprob import _forms as forms

    temperature = torch.ones(N, 1, dtype=torch.float64)
    arguments = (noise(N, H), noise(V, H), noise(V), whole(N, V), temperature, None, 5.0, True, -100, save)
    # What is kept is used up by backward, which a result of the whole graph cannot be; the last check makes it one.
    last = () if save else ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(
        forms.operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *last)
    )


def test_runtime_numbers_do_not_recompile():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda z, t: ops.selected_logprob(z, torch.zeros(6, dtype=torch.int64), temperature=t).logp,
        fullgraph=True,
        backend="eager",
    )
    logits = noise(6, 9, requires_grad=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = compiled(logits, torch.tensor(0.7))
        second = compiled(logits, torch.tensor(0.9))
    assert not torch.equal(first, second)
