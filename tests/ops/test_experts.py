"""Routing and experts against a loop over tokens."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from torch.nn.functional import silu

from prism_fast.ops import moe_experts, native, plan_experts, route_experts
from prism_fast.ops.native import moe_experts as compiled
from prism_fast.ops.reference.moe_experts import _dense

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
PLAN = attrgetter("permutation", "tokens", "slots", "offsets")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


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
    assert torch.equal(routing.tokens, (routing.permutation // top_k).int())
    assert torch.equal(routing.permutation[routing.slots], torch.arange(11 * top_k).view(11, top_k))
    assert routing.tokens.dtype == routing.slots.dtype == torch.int32
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
    for name in ("weights", "experts", "permutation", "tokens", "slots", "offsets"):
        assert torch.equal(getattr(plan, name), getattr(routing, name)), name
    assert plan.load.numel() == 0 and plan.z_stat.numel() == 0
    bad = plan_experts(torch.tensor([[0, 7], [1, 2]]), torch.full((2, 2), 0.5), 4)
    assert bad.weights.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_hub_layout_is_passed_as_a_view(backend, generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits.detach(), 2)
    stored = gate_up.detach().transpose(1, 2).contiguous().requires_grad_()  # [E, H, 2I]
    found = moe_experts(hidden, stored.transpose(1, 2), down, routing, backend=backend)
    wanted = moe_experts(hidden, gate_up, down, routing, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    ours, theirs = torch.autograd.grad(found.sum(), stored)[0], torch.autograd.grad(wanted.sum(), gate_up)[0]
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-12, atol=1e-13)


@needs_native
@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients_are_formed(frozen, generator):
    hidden, gate_up, down, logits = layer(generator)
    sources = [hidden, gate_up, down, logits]
    sources[frozen] = sources[frozen].detach()
    found, wanted = (
        moe_experts(*sources[:3], route_experts(sources[3], 2), backend=backend) for backend in ("native", "reference")
    )
    learning = [x for x in sources if x.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), learning),
        torch.autograd.grad(wanted.square().sum(), learning),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@needs_native
def test_backward_twice_and_bitwise_repeatable(generator):
    sources = layer(generator, tokens=40, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = moe_experts(*sources[:3], route_experts(sources[3], 2), backend="native")
        for keep in (True, False):
            runs.append((out, *torch.autograd.grad(out.square().sum(), sources, retain_graph=keep)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_native
def test_recompute_keeps_only_the_inputs(generator):
    hidden, gate_up, down, logits = layer(generator)
    routing = route_experts(logits, 2)
    sizes = {}
    for recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            moe_experts(hidden, gate_up, down, routing, recompute=recompute, backend="native")
        sizes[recompute] = sum(x.numel() for x in kept)
    assert sizes[False] - sizes[True] == 13 * 2 * 10  # the up-projection [M, 2I]


@needs_native
def test_operators_are_registered_properly(generator):
    hidden, gate_up, down, logits = layer(generator, tokens=5)
    routing = route_experts(logits.detach(), 2)
    plan = (routing.weights.requires_grad_(), *PLAN(routing))
    torch.library.opcheck(compiled._operator, (hidden, gate_up, down, *plan, True))
    out, kept = compiled._forward(hidden.detach(), gate_up.detach(), down.detach(), *plan, True)
    inputs = [x.detach() for x in (torch.ones_like(out), hidden, gate_up, down, *plan, kept)]
    torch.library.opcheck(compiled._backward_operator, (*inputs, [True, False, True, True]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_does_not_round(dtype, backend, recompute, generator):
    width, inner = (8, 4) if dtype == torch.float32 else (8, 8)  # multiples of 16 bytes
    sources = layer(generator, width=width, inner=inner, dtype=dtype)

    def run():
        out = moe_experts(*sources[:3], route_experts(sources[3], 2), backend=backend, recompute=recompute)
        return out, (out * torch.arange(1.0, 9.0)).sum()

    wanted, total = run()
    gradients = torch.autograd.grad(total, sources)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, total = run()
        inside = torch.autograd.grad(total, sources, retain_graph=True)
    assert torch.equal(found, wanted)
    for ours, mine, theirs in zip(torch.autograd.grad(total, sources), inside, gradients, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(mine, theirs)


def test_gradcheck(generator):
    hidden, gate_up, down, logits = layer(generator, tokens=3, experts=3, width=3, inner=2)

    def run(hidden, gate_up, down, logits):
        return moe_experts(hidden, gate_up, down, route_experts(logits, 2))

    assert torch.autograd.gradcheck(run, (hidden, gate_up, down, logits))


def both_ways(sources, routing_of, backends=("native", "reference"), **options):
    """(output, gradients of every source) of each backend under one upstream gradient."""
    results = []
    for backend in backends:
        out = moe_experts(*sources[:3], routing_of(sources[3]), backend=backend, **options)
        upstream = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), sources)))
    return results


def poison() -> None:
    """Leave NaN in the memory that the next small tensors get."""
    for size in (50, 500, 5_000, 50_000):
        [torch.full((size,), float("nan"), dtype=torch.float64) for _ in range(20)].clear()


@needs_native
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "inner"),
    [(0, 3, 2, 4, 5), (1, 1, 1, 6, 5), (5, 1, 1, 3, 1), (1, 6, 2, 8, 3), (70, 8, 3, 33, 17), (300, 3, 2, 40, 600)],
)
def test_shapes(tokens, experts, top_k, width, inner, recompute, generator):
    sources = layer(generator, tokens, experts, width, inner)
    poison()
    found, wanted = both_ways(sources, lambda logits: route_experts(logits, top_k), recompute=recompute)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@needs_native
def test_experts_without_tokens_get_exact_zeros(generator):
    hidden, gate_up, down, logits = layer(generator, tokens=30)
    crowded = logits.detach() + torch.tensor([0.0, 50.0, 0.0, 50.0], dtype=torch.float64)  # nobody asks for 0 and 2
    for _ in range(3):
        poison()
        out = moe_experts(hidden, gate_up, down, route_experts(crowded, 2), backend="native")
        for gradient in torch.autograd.grad(out.sum(), (gate_up, down)):
            assert (gradient[[0, 2]] == 0).all() and (gradient[[1, 3]] != 0).any()


@needs_native
def test_an_expert_chosen_twice_and_an_unknown_one(generator):
    hidden, gate_up, down, _ = layer(generator, tokens=40)
    index = torch.randint(0, 4, (40, 3), generator=generator)
    index[:, 1] = index[:, 0]
    weights = torch.rand(40, 3, generator=generator, dtype=torch.float64).requires_grad_()
    sources = (hidden, gate_up, down, weights)
    found, wanted = both_ways(sources, lambda weights: plan_experts(index, weights, 4))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    index[7, 2] = 9
    out = moe_experts(hidden, gate_up, down, plan_experts(index, weights, 4), backend="native")
    assert out.isnan().any(1).nonzero().tolist() == [[7]]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_eager(dtype, generator):
    rounded = [x.detach().to(dtype) for x in layer(generator, 200, 4, 48, 40)]
    rounded[0] *= 3.0  # gates up to some tens
    routing = route_experts(rounded[3].double(), 2)

    def run(backend, kind):
        sources = [x.to(kind).requires_grad_() for x in rounded[:3]]
        weights = routing.weights.to(torch.promote_types(kind, torch.float32)).requires_grad_()
        plan = routing._replace(weights=weights)
        out = moe_experts(*sources, plan, backend=backend)
        upstream = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).to(kind)
        return [out, *torch.autograd.grad((out * upstream).sum(), (*sources, weights))]

    exact, eager, found = run("reference", torch.float64), run("reference", dtype), run("native", dtype)
    for true, theirs, ours in zip(exact, eager, found, strict=True):
        assert ours.dtype == theirs.dtype
        errors = [(x.double() - true).norm() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps * true.norm() / true.numel() ** 0.5, errors


@needs_native
@pytest.mark.parametrize("backend", ["native", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_tokens_are_as_accurate_as_eager(backend, dtype, generator):
    """One number's error may be nothing by luck, also eager's: the errors of many layers of one token together."""
    ours, theirs, size = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    for _ in range(40):
        rounded = [x.detach().to(dtype) for x in layer(generator, 1, 1, 40, 96)]
        upstream = torch.randn(1, 40, generator=generator).to(dtype)

        def run(backend, kind, rounded=rounded, upstream=upstream):
            sources = [x.to(kind).requires_grad_() for x in rounded[:3]]
            weights = torch.full((1, 1), 0.7, dtype=torch.promote_types(kind, torch.float32)).requires_grad_()
            plan = plan_experts(torch.zeros(1, 1, dtype=torch.int64), weights, 1)
            out = moe_experts(*sources, plan, backend=backend)
            return [out.detach(), *torch.autograd.grad((out * upstream.to(kind)).sum(), (*sources, weights))]

        for i, (true, eager, found) in enumerate(
            zip(run("reference", torch.float64), run("reference", dtype), run(backend, dtype), strict=True)
        ):
            ours[i] += (found.double() - true).square().mean()
            theirs[i] += (eager.double() - true).square().mean()
            size[i] += true.square().mean()
    assert (ours.sqrt() <= 2 * theirs.sqrt() + 4 * torch.finfo(dtype).eps * size.sqrt() / 40**0.5).all(), (ours, theirs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gate_at_its_limits(dtype):
    """One row through one expert of width 1: silu of what is large, infinite, tiny or missing."""
    big = 1e30
    gates = torch.tensor([-big, -90.0, -1e-30, 0.0, 1e-30, 90.0, big, float("inf"), float("nan")], dtype=dtype)
    gate_up = torch.stack([torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)])[None]  # gate x, up 0 x
    down = torch.ones(1, 1, 1, dtype=dtype)
    one = plan_experts(torch.zeros(len(gates), 1, dtype=torch.int64), torch.ones(len(gates), 1, dtype=dtype), 1)
    hidden = gates[:, None].clone().requires_grad_()
    gate_up = gate_up.clone().requires_grad_()
    moe_experts(hidden, gate_up, down, one, backend="native")[:7].sum().backward()
    assert torch.equal(hidden.grad[:7], torch.zeros(7, 1, dtype=dtype))
    act = torch.empty(len(gates), 1, dtype=dtype)
    compiled._swiglu(torch.stack([gates, torch.ones_like(gates)], 1), act)
    torch.testing.assert_close(act[:, 0], silu(gates), equal_nan=True, rtol=4 * torch.finfo(dtype).eps, atol=1e-35)
    assert act[0, 0] == 0


@needs_native
@pytest.mark.skipif(not native.has_products(), reason="PyTorch's library lends no products")
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "inner"),
    [
        (40, 8, 2, 30, 31),
        (7, 1, 1, 64, 98),
        (100, 2, 2, 29, 3),
        (3000, 4, 2, 32, 24),
        (3000, 64, 2, 40, 39),
        (1500, 1, 1, 600, 40),
    ],
)
def test_products_do_not_depend_on_threads(tokens, experts, top_k, width, inner, generator):
    """Experts of few tokens, widths that fill no vector, blocks of several threads."""
    sources = layer(generator, tokens, experts, width, inner, torch.float32)
    upstream = torch.randn(tokens, width, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out = moe_experts(*sources[:3], route_experts(sources[3], top_k), backend="native")
            results.append((out, *torch.autograd.grad((out * upstream).sum(), sources)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.skipif(not native.has_products(), reason="PyTorch's library lends no products")
def test_products_of_any_strides(generator):
    def laid_out(rows, columns):
        dense = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        wide = torch.zeros(2 * rows, 3 * columns, dtype=torch.float64)
        wide[::2, 1::3] = dense
        views = [dense, dense.t().contiguous().t(), wide[::2, 1::3]]
        return [*views, dense[:1].expand(rows, columns), dense[:, :1].expand(rows, columns)]

    for rows, columns, depth in ((1, 1, 1), (5, 1, 7), (1, 6, 3), (300, 530, 9), (4, 3, 0)):
        outs = laid_out(rows, columns)[:3]
        for a in laid_out(rows, depth):
            for b in laid_out(depth, columns):
                for out in outs:
                    compiled._product(a, b, out.fill_(float("nan")))
                    torch.testing.assert_close(out, a @ b, rtol=1e-12, atol=1e-12)


@needs_native
def test_bits_of_the_passes_do_not_depend_on_threads(generator):
    """Every token has three rows in one expert, so that the threads' borders fall between rows of one token."""
    before, results = torch.get_num_threads(), []
    rows = torch.randn(910, 400, generator=generator)
    mine, weights = torch.arange(910), torch.rand(910, generator=generator)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            act, d_act, d_pre = torch.empty(910, 200), rows[:, :200].contiguous(), torch.empty(910, 400)
            d_weights, total = torch.zeros(910), torch.zeros(304, 400)
            compiled._swiglu(rows, act)
            compiled._swiglu_backward(rows, mine, weights, d_act, d_pre, d_weights)
            compiled._add_rows(rows, mine, 3, weights, total)
            results.append((act, d_act, d_pre, d_weights, total))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_grouped_products_of_pytorch(generator):
    """As the CPU computes them, with plain PyTorch in between."""
    sources = layer(generator, 50, 4, 16, 24, torch.float32)
    for recompute in (False, True):
        found, wanted = both_ways(
            sources, lambda logits: route_experts(logits, 2), ("stock", "reference"), recompute=recompute
        )
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    hidden, gate_up, down, logits = sources
    crowded = route_experts(logits.detach() + torch.tensor([0.0, 50.0, 0.0, 50.0]), 2)
    gradient = torch.autograd.grad(moe_experts(hidden, gate_up, down, crowded, backend="stock").sum(), gate_up)[0]
    assert (gradient[[0, 2]] == 0).all()
    nobody = route_experts(logits[:0], 2)
    assert moe_experts(hidden[:0], gate_up, down, nobody, backend="stock").shape == (0, 16)
    with pytest.raises(NotImplementedError, match="backend='stock' takes float32.*multiples of 16 bytes.*H 16, I 24"):
        moe_experts(hidden.double(), gate_up.double(), down.double(), crowded, backend="stock")
    with pytest.raises(NotImplementedError, match="H 16, I 23"):
        moe_experts(hidden, gate_up[:, :46], down[:, :, :23], crowded, backend="stock")


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", ["reference", "native", "stock"])
def test_a_plan_of_any_strides(backend):
    """Every part a view into memory whose other numbers would show."""
    if backend == "native" and not native.available():
        pytest.skip(native.why_not())
    generator = torch.Generator().manual_seed(5)
    hidden, gate_up, down = (torch.randn(*s, generator=generator) for s in ((7, 8), (3, 8, 8), (3, 8, 4)))
    routing = route_experts(torch.randn(7, 3, generator=generator), 2)

    def apart(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((*x.shape, 3), 99, dtype=x.dtype)
        room[..., 1] = x
        return room[..., 1]

    def run(plan):
        leaves = [x.clone().requires_grad_() for x in (hidden, gate_up, down)]
        out = moe_experts(*leaves, plan, backend=backend)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    spread = routing._replace(**{
        name: apart(getattr(routing, name).detach())
        for name in ("weights", "experts", "permutation", "tokens", "slots", "offsets")
    })  # fmt: skip
    assert not spread.weights.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(spread), run(routing), strict=True))


@pytest.mark.parametrize("result", ["weights", "z_stat", "load"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_softmax_is_nan_in_every_result_and_gradient(backend, result):
    logits = torch.tensor([[0.5, 1.0, 0.0], [-torch.inf] * 3], requires_grad=True)
    found = route_experts(logits, 1, backend=backend)
    assert found.z_stat.isnan() and found.load.isnan().all() and found.weights[1].isnan().all()
    (gradient,) = torch.autograd.grad(getattr(found, result).sum(), logits)
    assert gradient[1].isnan().all() and (result == "load" or gradient[0].isfinite().all())
