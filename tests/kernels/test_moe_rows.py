"""The passes between the experts' products against formulas in float64, and the experts that PyTorch's grouped products
compute around them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs these kernels")
from tests.support.triton_device import DEVICE  # noqa: I001  (repairs the interpreter before kernels are imported)
from prism_fast.kernels.moe import rows
from prism_fast.ops import moe_experts, plan_experts, route_experts
from prism_fast.ops.stock import expert_rows
from prism_fast.ops.stock import moe_experts as stock
from tests.kernels.moe_cases import NAMES, assert_accurate, evaluate, exact, layer
from tests.support.poison import poisoned

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
SHAPES = [(1, 1, 1), (1, 3, 2), (7, 16, 1), (5, 33, 3), (3, 530, 2)]  # tokens, columns, top_k; beyond one block of 512


@pytest.fixture(autouse=True)
def passes_of_a_card(monkeypatch):
    """On the CPU the kernels stand between PyTorch's products as they do on a card."""
    monkeypatch.setattr(stock, "_rows", lambda x: rows)


def noise(generator, dtype, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def plan(generator, tokens, top_k, experts=5):
    index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    return plan_experts(index.to(DEVICE), weights.to(DEVICE), experts, backend="reference")


def close(found, true, terms: int = 1) -> None:
    """Within the rounding of the result and of ``terms`` additions in float32."""
    size = true.abs().max() if true.numel() else 0.0
    limit = torch.finfo(found.dtype).eps + terms * torch.finfo(torch.float32).eps
    assert found.shape == true.shape and ((found.double() - true).abs() <= 4 * limit * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "top_k"), SHAPES)
def test_rows_are_gathered_and_combined(tokens, width, top_k, dtype, generator):
    routing = plan(generator, tokens, top_k)
    x = noise(generator, dtype, width + 3, tokens + 2).t()[:tokens, 1 : width + 1]  # columns lie side by side
    parts = noise(generator, dtype, tokens * top_k, width)
    with poisoned(float("nan")):
        gathered = rows.gather_rows(x, routing.tokens)
        combined = [rows.combine_rows(parts, routing.slots, w) for w in (routing.weights, None)]
    assert torch.equal(gathered, x[routing.tokens])
    assert torch.equal(gathered, expert_rows.gather_rows(x, routing.tokens))
    by_choice = torch.empty_like(parts).double()
    by_choice[routing.permutation] = parts.double()
    by_choice = by_choice.view(tokens, top_k, width)
    close(combined[0], (by_choice * routing.weights.double()[..., None]).sum(1), top_k)
    close(combined[1], by_choice.sum(1), top_k)
    for found, w in zip(combined, (routing.weights, None), strict=True):
        assert torch.equal(found, expert_rows.combine_rows(parts, routing.slots, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "top_k"), SHAPES)
def test_swiglu_and_its_gradient(tokens, inner, top_k, dtype, generator):
    routing = plan(generator, tokens, top_k)
    pre = 3 * noise(generator, dtype, tokens * top_k, 2 * inner)
    d = noise(generator, dtype, tokens * top_k, inner)
    wide = pre.double().requires_grad_()
    weights = routing.weights.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    act = gate * gate.sigmoid() * up
    weighted = act * weights.flatten()[routing.permutation, None]
    wanted = torch.autograd.grad((weighted * d.double()).sum(), (wide, weights))
    for each in (rows, expert_rows):
        taken = d.clone()
        with poisoned(float("nan")):
            found = each.swiglu(pre)
            d_pre, share = each.swiglu_gradient(taken, pre, routing.weights, routing.permutation)
        close(found, act.detach())
        close(taken, weighted.detach())
        close(d_pre, wanted[0])
        close(share, wanted[1], inner)


def test_experts_without_slots_are_cleared(generator):
    full = torch.full((4, 70, 80), 7.0, device=DEVICE, dtype=BF16)
    rows.clear_idle(full, torch.tensor([0, 3, 3, 9, 9], dtype=torch.int32, device=DEVICE))
    assert full[[0, 2]].eq(7.0).all() and not full[[1, 3]].any()


LAYERS = [  # (tokens, experts, top_k, hidden, inner)
    (53, 3, 2, 40, 24), (53, 3, 1, 64, 32), (1, 4, 2, 16, 16), (5, 6, 3, 24, 40), (0, 4, 2, 16, 8), (9, 1, 1, 16, 8),
]  # fmt: skip
on_a_card = DEVICE == "cuda"  # where grouped_mm is for bfloat16


@pytest.mark.parametrize("dtype", (BF16,) if on_a_card else DTYPES)
@pytest.mark.parametrize("shape", LAYERS)
def test_forward_and_every_gradient(shape, dtype, generator):
    tokens, experts, top_k, hidden, inner = shape
    sources = layer(generator, tokens, experts, hidden, inner, dtype)
    g = torch.randn(tokens, hidden, generator=generator).to(DEVICE)
    routing = route_experts(sources[3], top_k)
    with poisoned(float("nan")):
        found = evaluate(sources, routing, g, "stock")
    eager = evaluate(sources, route_experts(sources[3], top_k), g, "reference")
    assert_accurate(found, eager, exact(sources, routing, g))


def test_experts_without_tokens_get_exact_zeros(generator):
    sources = layer(generator, 20, 5, 16, 16, BF16)
    with torch.no_grad():
        sources[3][:, [0, 3]] = -100.0
    for _ in range(3):
        torch.full((5, 32, 16), float("nan"), device=DEVICE, dtype=BF16)  # memory that the next products may get
        found = evaluate(sources, route_experts(sources[3], 2), torch.ones(20, 16, device=DEVICE), "stock")
        assert not found["gate_up"][[0, 3]].any() and not found["down"][[0, 3]].any()
        assert found["gate_up"][[1, 2, 4]].any(-1).all()


def test_strides_are_free_and_gradients_follow_them(generator):
    sources = layer(generator, 30, 2, 24, 40, BF16)
    routing = route_experts(sources[3].detach(), 2)
    hub = [w.detach().transpose(1, 2).contiguous().requires_grad_() for w in sources[1:3]]  # as hub files hold them
    mixed = [w.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for w in sources[1:3]]
    wide = torch.zeros(30, 60, device=DEVICE, dtype=BF16)
    wide[:, 7:31] = sources[0].detach()
    view = wide[:, 7:31].requires_grad_()
    g = torch.randn(24, 30, generator=generator).to(DEVICE).t().to(BF16)
    wanted = moe_experts(*sources[:3], routing, backend="stock")
    theirs = torch.autograd.grad((wanted * g).sum(), sources[:3])
    for weights, back in ((hub, lambda w: w.transpose(1, 2)), (mixed, lambda w: w)):
        found = moe_experts(view, *map(back, weights), routing, backend="stock")
        ours = torch.autograd.grad((found * g).sum(), (view, *weights))
        torch.testing.assert_close(found, wanted)
        for mine, other, source in zip(ours[1:], theirs[1:], weights, strict=True):
            assert mine.stride() == source.stride()
            torch.testing.assert_close(back(mine), other)


def test_bits_repeat_and_do_not_depend_on_recomputing(generator):
    sources = layer(generator, 20, 2, 24, 40, BF16)
    g = torch.randn(20, 24, generator=generator).to(DEVICE)
    runs = [
        evaluate(sources, route_experts(sources[3], 2), g, "stock", recompute=recompute)
        for recompute in (False, False, True)
    ]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in NAMES)


def test_the_up_projection_alone_is_kept(generator):
    sources = layer(generator, 40, 4, 24, 40, BF16)
    routing, sizes = route_experts(sources[3], 2), {}
    for recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            moe_experts(*sources[:3], routing, recompute=recompute, backend="stock")
        sizes[recompute] = sum(x.numel() for x in kept)
    assert sizes[False] - sizes[True] == 40 * 2 * 2 * 40


def test_an_unknown_expert_spoils_its_token_alone(generator):
    sources = [s.detach() for s in layer(generator, 6, 3, 16, 16, BF16)]
    index = torch.tensor([[0], [7], [2], [1], [1], [0]], device=DEVICE)
    given = plan_experts(index, torch.ones(6, 1, device=DEVICE), 3)
    out = moe_experts(*sources[:3], given, backend="stock")
    assert out.isnan().all(1).tolist() == [False, True, False, False, False, False]


def test_operators_are_registered_properly(generator):
    hidden, gate_up, down, logits = layer(generator, 5, 2, 16, 16, BF16)
    routing = route_experts(logits.detach(), 1)
    given = (routing.weights, routing.permutation, routing.tokens, routing.slots, routing.offsets)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(stock._operator, (hidden, gate_up, down, *given, True), test_utils=checks)
    out, kept = stock._forward(hidden.detach(), gate_up.detach(), down.detach(), *given, True)
    inputs = [x.detach() for x in (torch.ones_like(out), hidden, gate_up, down, *given, kept)]
    torch.library.opcheck(stock._backward_operator, (*inputs, [True, False, True, True]), test_utils=checks)


def test_one_graph(generator):
    sources = layer(generator, 9, 3, 16, 16, BF16)

    def both(hidden, gate_up, down, logits):
        return moe_experts(hidden, gate_up, down, route_experts(logits, 2), backend="stock")

    torch.compiler.reset()
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*sources)
    wanted = both(*sources)
    assert torch.equal(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), sources), torch.autograd.grad(wanted.sum(), sources), strict=True
    ):
        assert torch.equal(ours, theirs)
