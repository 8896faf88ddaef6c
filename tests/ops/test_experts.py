"""Routing and experts against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from prism_fast.ops import moe_experts, plan_experts, route_experts
from prism_fast.ops.reference.moe_experts import _dense
from prism_fast.ops.stock import moe_experts as stock


def by_loop(hidden, gate_up, down, weights, experts):
    """[T, H] one token and one expert at a time."""
    rows = []
    for t in range(hidden.shape[0]):
        total = torch.zeros_like(hidden[t])
        for j in range(experts.shape[1]):
            e = int(experts[t, j])
            gate, up = (gate_up[e] @ hidden[t]).chunk(2)
            total = total + weights[t, j] * (down[e] @ (silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def layer(generator, tokens=13, experts=4, width=6, inner=5, dtype=torch.float64):
    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return noise(tokens, width), noise(experts, 2 * inner, width), noise(experts, width, inner), noise(tokens, experts)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_routing(top_k, renormalize, generator):
    logits = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    routing = route_experts(logits, top_k, renormalize=renormalize)
    probability = logits.softmax(-1)
    weights, experts = probability.topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights)
    sorted_experts = routing.experts.flatten()[routing.permutation]
    assert (sorted_experts.diff() >= 0).all()
    assert torch.equal(routing.permutation.sort().values, torch.arange(11 * top_k))
    for e in range(4):
        mine = routing.permutation[int(routing.offsets[e]) : int(routing.offsets[e + 1])]
        assert (routing.experts.flatten()[mine] == e).all() and (mine.diff() > 0).all()
    assert routing.offsets[0] == 0 and routing.offsets[-1] == 11 * top_k and routing.offsets.dtype == torch.int32
    torch.testing.assert_close(routing.load, probability.sum(0))
    torch.testing.assert_close(routing.z_stat, logits.logsumexp(-1).square().sum())
    found = torch.autograd.grad(routing.load[1] + routing.z_stat + routing.weights[:, 0].sum(), logits)[0]
    wanted = probability.sum(0)[1] + logits.logsumexp(-1).square().sum() + weights[:, 0].sum()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0])


def test_equal_probabilities_go_to_the_lower_expert():
    routing = route_experts(torch.zeros(3, 5), 2)
    assert routing.experts.tolist() == [[0, 1]] * 3
    assert routing.permutation.tolist() == [0, 2, 4, 1, 3, 5] and routing.offsets.tolist() == [0, 3, 6, 6, 6, 6]


def test_load_gives_the_switch_loss(generator):
    logits = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    routing = route_experts(logits, 2)
    chosen = torch.zeros(50, 4, dtype=torch.float64).scatter(1, routing.experts, 1.0)
    wanted = 4 * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    found = 4 * (routing.offsets.diff() / 50 * routing.load / 50).sum()
    torch.testing.assert_close(found, wanted)


def test_plan_starts_where_a_router_ends(generator):
    logits = torch.randn(9, 4, generator=generator)
    routing = route_experts(logits, 2)
    plan = plan_experts(routing.experts.int(), routing.weights, 4)
    for name in ("weights", "experts", "permutation", "offsets"):
        assert torch.equal(getattr(plan, name), getattr(routing, name)), name
    assert plan.load.numel() == 0 and plan.z_stat.numel() == 0
    bad = plan_experts(torch.tensor([[0, 7], [1, 2]]), torch.full((2, 2), 0.5), 4)
    assert bad.weights.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("backend", ["reference", "stock"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_equal_the_loop(top_k, recompute, backend, generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits, top_k)
    found = moe_experts(hidden, gate_up, down, routing, recompute=recompute, backend=backend)
    wanted = by_loop(hidden, gate_up, down, routing.weights, routing.experts)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    inputs = (hidden, gate_up, down, logits)
    found_gradients = torch.autograd.grad((found * g).sum(), inputs, retain_graph=True)
    wanted_gradients = torch.autograd.grad((wanted * g).sum(), inputs)
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(_dense(hidden, gate_up, down, routing), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_hub_layout_is_passed_as_a_view(backend, generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits.detach(), 2)
    stored = gate_up.detach().transpose(1, 2).contiguous().requires_grad_()  # [E, H, 2I]
    found = moe_experts(hidden, stored.transpose(1, 2), down, routing, backend=backend)
    wanted = moe_experts(hidden, gate_up, down, routing, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    ours, theirs = torch.autograd.grad(found.sum(), stored)[0], torch.autograd.grad(wanted.sum(), gate_up)[0]
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients_are_formed(frozen, generator):
    hidden, gate_up, down, logits = layer(generator)
    sources = [hidden, gate_up, down, logits]
    sources[frozen] = sources[frozen].detach()
    found, wanted = (
        moe_experts(*sources[:3], route_experts(sources[3], 2), backend=backend) for backend in ("stock", "reference")
    )
    learning = [x for x in sources if x.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), learning),
        torch.autograd.grad(wanted.square().sum(), learning),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_backward_twice_and_bitwise_repeatable(generator):
    sources = layer(generator, tokens=40, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = moe_experts(*sources[:3], route_experts(sources[3], 2), backend="stock")
        for keep in (True, False):
            runs.append((out, *torch.autograd.grad(out.square().sum(), sources, retain_graph=keep)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_recompute_keeps_only_the_inputs(generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits, 2)
    sizes = {}
    for recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            moe_experts(hidden, gate_up, down, routing, recompute=recompute, backend="stock")
        sizes[recompute] = sum(x.numel() for x in kept)
    assert sizes[False] - sizes[True] == 13 * 2 * 10  # the up-projection [M, 2I]


def test_operators_are_registered_properly(generator):
    hidden, gate_up, down, logits = layer(generator, tokens=5)
    routing = route_experts(logits.detach(), 2)
    plan = (routing.weights.requires_grad_(), routing.permutation, routing.offsets)
    torch.library.opcheck(stock._operator, (hidden, gate_up, down, *plan, True))
    out, kept = stock._forward(hidden.detach(), gate_up.detach(), down.detach(), *plan, True)
    inputs = [x.detach() for x in (torch.ones_like(out), hidden, gate_up, down, *plan, kept)]
    torch.library.opcheck(stock._backward_operator, (*inputs, [True, False, True, True]))


def test_autocast_does_not_round(generator):
    hidden, gate_up, down, logits = layer(generator, dtype=torch.float32)
    routing = route_experts(logits, 2)
    wanted = moe_experts(hidden, gate_up, down, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe_experts(hidden, gate_up, down, routing), wanted)


def test_gradcheck(generator):
    hidden, gate_up, down, logits = layer(generator, tokens=3, experts=3, width=3, inner=2)

    def run(hidden, gate_up, down, logits):
        return moe_experts(hidden, gate_up, down, route_experts(logits, 2))

    assert torch.autograd.gradcheck(run, (hidden, gate_up, down, logits))


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 1), (5, 1), (1, 6)])
def test_degenerate_shapes(tokens, experts, generator):
    hidden, gate_up, down, logits = layer(generator, tokens=tokens, experts=experts)
    out = moe_experts(hidden, gate_up, down, route_experts(logits, 1))
    assert out.shape == hidden.shape
    out.sum().backward()
    assert gate_up.grad.isfinite().all() and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_half_precision(backend, generator):
    hidden, gate_up, down, logits = (x.detach() for x in layer(generator, dtype=torch.bfloat16))
    out = moe_experts(hidden, gate_up, down, route_experts(logits, 2), backend=backend)
    exact = moe_experts(hidden.double(), gate_up.double(), down.double(), route_experts(logits.double(), 2))
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 0.02 * exact.norm()


def test_refusals(generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits, 2)
    for top_k in (0, 5, 2.0, True):
        with pytest.raises(ValueError, match=r"route_experts: top_k=.* must be an integer in \[1, 4\]"):
            route_experts(logits, top_k)
    with pytest.raises(ValueError, match=r"plan_experts: top_k_weights must have shape \[2, 2\]"):
        plan_experts(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1), 4)
    with pytest.raises(ValueError, match="plan_experts: num_experts=0"):
        plan_experts(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match=r"moe_experts: gate_up must have shape \[any, any, 6\]"):
        moe_experts(hidden, gate_up.transpose(1, 2), down, routing)
    with pytest.raises(ValueError, match=r"moe_experts: down must have shape \[4, 6, 5\]"):
        moe_experts(hidden, gate_up, down.transpose(1, 2), routing)
    with pytest.raises(ValueError, match="moe_experts: routing must be a Routing"):
        moe_experts(hidden, gate_up, down, tuple(routing))
    with pytest.raises(ValueError, match=r"moe_experts: routing.offsets must have shape \[5\], got \[4\]"):
        moe_experts(hidden, gate_up, down, route_experts(logits[:, :3], 2))
