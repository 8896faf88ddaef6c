"""The expert kernels against the float64 reference, on fresh random inputs, at small tiles so that several meet."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs these kernels")
from tests.support.triton_device import DEVICE  # noqa: I001  (repairs the interpreter before kernels are imported)
from prism_fast.kernels.moe import Tile, Tiles, tiles
from prism_fast.ops import moe_experts, plan_experts, route_experts
from prism_fast.ops.triton import moe_experts as kernels
from tests.kernels.moe_cases import NAMES, assert_accurate, evaluate, exact, layer
from tests.support.poison import poisoned

SMALL = Tiles(*(Tile(32, 32, 32, 2, 4) for _ in range(3)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(tiles, "TILES", {(90, 2): SMALL, (90, 4): SMALL})


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # (tokens, experts, top_k, hidden, inner), dtype; a whole step and a ragged one, one and several tiles
    ((53, 3, 2, 40, 36), F32), ((53, 3, 2, 64, 32), BF16), ((53, 3, 2, 40, 36), F16), ((1, 4, 2, 16, 16), F32),
    ((9, 1, 1, 17, 5), BF16), ((5, 6, 3, 24, 33), F32), ((0, 4, 2, 16, 8), BF16),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_forward_and_every_gradient(shape, dtype, generator):
    tokens, experts, top_k, hidden, inner = shape
    sources = layer(generator, tokens, experts, hidden, inner, dtype)
    g = torch.randn(tokens, hidden, generator=generator).to(DEVICE)
    routing = route_experts(sources[3], top_k)
    with poisoned(float("nan")):
        found = evaluate(sources, routing, g, "triton")
    eager = evaluate(sources, route_experts(sources[3], top_k), g, "reference")
    assert_accurate(found, eager, exact(sources, routing, g))


def test_experts_without_tokens_get_exact_zeros(generator):
    sources = layer(generator, 20, 5, 16, 16, torch.float32)
    with torch.no_grad():
        sources[3][:, [0, 3]] = -100.0
    routing = route_experts(sources[3], 2)
    assert routing.offsets.diff()[[0, 3]].tolist() == [0, 0]
    found = evaluate(sources, routing, torch.ones(20, 16, device=DEVICE), "triton")
    assert not found["gate_up"][[0, 3]].any() and not found["down"][[0, 3]].any()
    assert found["gate_up"][[1, 2, 4]].any(-1).all()


def test_strides_are_free_and_gradients_follow_them(generator):
    sources = layer(generator, 30, 2, 24, 20, torch.float32)
    routing = route_experts(sources[3].detach(), 2)
    hub = [w.detach().transpose(1, 2).contiguous().requires_grad_() for w in sources[1:3]]  # as hub files hold them
    wide = torch.zeros(30, 60, device=DEVICE)
    wide[:, 7:31] = sources[0].detach()
    view = wide[:, 7:31].requires_grad_()
    g = torch.randn(24, 30, generator=generator).to(DEVICE).t()
    wanted = moe_experts(*sources[:3], routing, backend="triton")
    found = moe_experts(view, hub[0].transpose(1, 2), hub[1].transpose(1, 2), routing, backend="triton")
    assert torch.equal(found, wanted)
    ours = torch.autograd.grad((found * g).sum(), (view, *hub))
    theirs = torch.autograd.grad((wanted * g).sum(), sources[:3])
    assert torch.equal(ours[0], theirs[0])
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.is_contiguous() and torch.equal(mine.transpose(1, 2), other)


def test_bits_repeat_and_do_not_depend_on_recomputing(generator):
    sources = layer(generator, 20, 2, 24, 20, torch.bfloat16)
    g = torch.randn(20, 24, generator=generator).to(DEVICE)
    runs = [
        evaluate(sources, route_experts(sources[3], 2), g, "triton", recompute=recompute)
        for recompute in (False, False, True)
    ]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in NAMES)


def test_recompute_keeps_only_the_inputs(generator):
    sources = layer(generator, 40, 4, 24, 20, torch.float32)
    routing = route_experts(sources[3], 2)
    sizes = {}
    for recompute in (False, True):  # only the forward runs
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            moe_experts(*sources[:3], routing, recompute=recompute, backend="triton")
        sizes[recompute] = sum(x.numel() for x in kept)
    assert sizes[False] - sizes[True] == 40 * 2 * 2 * 20


def test_an_unknown_expert_spoils_its_token_alone(generator):
    sources = [s.detach() for s in layer(generator, 6, 3, 16, 16, torch.float32)]
    plan = plan_experts(torch.tensor([[0], [7], [2], [1], [1], [0]], device=DEVICE), torch.ones(6, 1, device=DEVICE), 3)
    out = moe_experts(*sources[:3], plan, backend="triton")
    assert out.isnan().all(1).tolist() == [False, True, False, False, False, False] and not out[2:].isnan().any()


def test_frozen_weights_drop_their_products(generator, monkeypatch):
    from prism_fast.kernels import moe

    calls = []
    original = moe.weight_gradient
    monkeypatch.setattr(moe, "weight_gradient", lambda *a, **o: calls.append(1) or original(*a, **o))
    sources = layer(generator, 20, 4, 16, 16, torch.float32)
    sources[1], sources[2] = sources[1].detach(), sources[2].detach()
    out = moe_experts(*sources[:3], route_experts(sources[3], 2), backend="triton")
    hidden = torch.autograd.grad(out.sum(), (sources[0], sources[3]))[0]
    assert hidden.isfinite().all() and not calls


def test_operators_are_registered_properly(generator):
    hidden, gate_up, down, logits = layer(generator, 5, 2, 16, 16, torch.float32)
    routing = route_experts(logits.detach(), 1)
    plan = (routing.weights, routing.permutation, routing.tokens, routing.slots, routing.offsets)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._operator, (hidden, gate_up, down, *plan, True), test_utils=checks)
    out, kept = kernels._forward(hidden.detach(), gate_up.detach(), down.detach(), *plan, True)
    inputs = [x.detach() for x in (torch.ones_like(out), hidden, gate_up, down, *plan, kept)]
    torch.library.opcheck(kernels._backward_operator, (*inputs, [True, False, True, True]), test_utils=checks)


def test_one_graph(generator):
    sources = layer(generator, 9, 3, 16, 16, torch.float32)

    def both(hidden, gate_up, down, logits):
        return moe_experts(hidden, gate_up, down, route_experts(logits, 2), backend="triton")

    torch.compiler.reset()
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*sources)
    wanted = both(*sources)
    assert torch.equal(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), sources), torch.autograd.grad(wanted.sum(), sources), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_float64_is_refused(generator):
    sources = layer(generator, 4, 2, 16, 16, torch.float64)
    with pytest.raises(NotImplementedError, match="backend='triton' has no float64; pass backend='reference'"):
        moe_experts(*sources[:3], route_experts(sources[3], 1), backend="triton")
