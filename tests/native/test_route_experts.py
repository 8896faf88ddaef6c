"""The compiled routing against the executable specification, on fresh random inputs and at the edges."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from prism_fast.ops import native, plan_experts, route_experts

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native import calls
from prism_fast.ops.native import route_experts as compiled

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(0, 3, 1), (1, 1, 1), (13, 4, 2), (255, 4, 4), (256, 9, 3), (700, 33, 5), (90, 256, 8)]
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def compare(found, wanted, tolerance) -> None:
    for name in found._fields:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "experts", "top_k"), SHAPES)
def test_parity_forward_and_backward(rows, experts, top_k, dtype, device, generator):
    for renormalize in (True, False):
        logits = (2 * torch.randn(rows, experts, generator=generator, dtype=torch.float64)).to(dtype).to(device)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found = route_experts(ours, top_k, renormalize=renormalize, backend="native")
        wanted = route_experts(theirs, top_k, renormalize=renormalize, backend="reference")
        compare(found, wanted, DTYPES[dtype])
        up = {n: torch.randn(getattr(found, n).shape, generator=generator, dtype=torch.float64) for n in FLOATS}
        for names in itertools.chain.from_iterable(itertools.combinations(FLOATS, n) for n in (1, 2, 3)):
            gradients = []
            for routing, source in ((found, ours), (wanted, theirs)):
                total = sum((getattr(routing, n) * up[n].to(getattr(routing, n))).sum() for n in names)
                gradients.append(torch.autograd.grad(total, source, retain_graph=True)[0])
            rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, DTYPES[dtype])
            torch.testing.assert_close(*gradients, rtol=rounding, atol=max(1e-3 * rounding, 5 * DTYPES[dtype]))


FLOATS = ("weights", "load", "z_stat")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "scale"),
    [(4096, 4, 2, 3.0), (257, 64, 4, 5.0), (257, 200, 8, 5.0), (64, 200, 7, 100.0), (64, 64, 1, 30.0)],
)  # up to logits so far apart that one weight is almost 1
def test_float32_is_as_accurate_as_eager(rows, experts, top_k, scale, renormalize, generator):
    logits = scale * torch.randn(rows, experts, generator=generator)
    up = torch.randn(rows, top_k, generator=generator)

    def run(logits, backend):
        logits = logits.clone().requires_grad_()
        found = route_experts(logits, top_k, renormalize=renormalize, backend=backend)
        through_weights = torch.autograd.grad((found.weights * up).sum(), logits, retain_graph=True)[0]
        through_rest = torch.autograd.grad(found.load.square().sum() + found.z_stat, logits)[0]
        return (*(getattr(found, name).detach() for name in FLOATS), through_weights, through_rest)

    for ours, theirs, true in zip(
        run(logits, "native"), run(logits, "reference"), run(logits.double(), "reference"), strict=True
    ):
        errors = [(x.double() - true).abs().max() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * true.abs().max()
        errors = [(x.double() - true).norm() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * true.norm() / true.numel() ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lower_expert(device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, -0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0, 3.0]])
    found = route_experts(logits.to(device), 3, backend="native")
    assert found.experts.tolist() == [[1, 2, 3], [0, 1, 2], [0, 2, 4]]
    # Rounding makes these two probabilities equal, not the logits.
    close = torch.tensor([[-20.0, 1.0, 1.0 + 2**-23]], dtype=torch.float32, device=device)
    assert route_experts(close - 30.0, 2, backend="native").experts.tolist()[0][0] in (1, 2)
    assert route_experts(close, 2, backend="native").experts.tolist() == [[2, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_softmax(device):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan, 1.0], [-inf] * 3, [0.0, inf, 1.0], [1.0, 2.0, -inf]], device=device)
    logits.requires_grad_()
    found = route_experts(logits, 2, backend="native")
    wanted = route_experts(logits, 2, backend="reference")
    assert found.experts.tolist() == wanted.experts.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]
    assert torch.equal(found.weights.isnan(), wanted.weights.isnan()) and found.weights[:3].isnan().all()
    assert torch.equal(found.permutation, wanted.permutation) and found.load.isnan().all()
    for name in ("weights", "load", "z_stat"):
        sums = [getattr(x, name).sum() for x in (found, wanted)]
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in sums)
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours[:3].isnan().all(), name


def test_strides_of_the_logits_and_of_the_upstream_gradients(generator):
    wide = torch.randn(50, 12, generator=generator)
    for logits in (wide[:, 3:8], wide.t()[:12, :7], wide[::2, :5]):
        ours, theirs = logits.detach().requires_grad_(), logits.contiguous().detach().requires_grad_()
        found, wanted = route_experts(ours, 2, backend="native"), route_experts(theirs, 2, backend="reference")
        compare(found, wanted, 2e-6)
        for routing in (found, wanted):  # expanded gradients have stride 0
            (routing.weights[:, 0].sum() + routing.load.sum() + routing.weights.sum(1)[3]).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "experts", "top_k"), SHAPES)
def test_plan_parity(rows, experts, top_k, device, generator):
    index = torch.randint(-1, experts + 1, (rows, top_k), generator=generator).to(device)  # repetitions and strangers
    for integer, dtype in ((torch.int32, torch.float64), (torch.int64, torch.bfloat16)):
        weights = torch.rand(rows, top_k, generator=generator, dtype=torch.float64).to(dtype).to(device)
        ours, theirs = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        found = plan_experts(index.to(integer), ours, experts, backend="native")
        wanted = plan_experts(index.to(integer), theirs, experts, backend="reference")
        compare(found, wanted, 0.0)
        for routing in (found, wanted):
            (routing.weights * torch.arange(1.0, top_k + 1, device=device)).sum().backward()
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_poisoned_memory_is_overwritten_and_bits_repeat(device, generator):
    logits = torch.randn(600, 6, generator=generator).to(device)
    first = route_experts(logits, 2, backend="native")
    out = compiled._allocate(logits, 2)
    work = compiled.workspaces(logits, 6)
    for x in (*out, *(x for x in work if x is not None)):
        x.fill_(float("nan") if x.is_floating_point() else -(2**30))
    compiled.into(out, work, logits, 2, True)
    for ours, theirs in zip(out, first, strict=True):
        assert torch.equal(ours, theirs)


def test_bits_do_not_depend_on_threads(generator):
    logits = torch.randn(30_000, 8, generator=generator).requires_grad_()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = route_experts(logits, 2, backend="native")
            total = found.z_stat + found.load[1] + found.weights[:, 1].sum()
            results.append((*found, torch.autograd.grad(total, logits)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_are_registered_properly(generator):
    logits = torch.randn(9, 5, generator=generator, requires_grad=True)
    torch.library.opcheck(compiled._operator, (logits, 2, True))
    weights, experts, *_ = compiled._run(logits.detach(), 2, True)
    up = torch.randn(9, 2, generator=generator)
    torch.library.opcheck(compiled._gradient_operator, (logits.detach(), weights, experts, up, None, None, True))
    torch.library.opcheck(compiled._plan_operator, (experts, weights.requires_grad_(), 5))


def test_sizes_beyond_the_kernels_are_refused():
    with pytest.raises(NotImplementedError, match="route_experts: the native kernels hold at most 256 experts"):
        route_experts(torch.zeros(2, 257), 2, backend="native")
    with pytest.raises(NotImplementedError, match=r"plan_experts: .* top_k 8, got 16 and 9; pass backend='reference'"):
        plan_experts(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9), 16, backend="native")


def test_python_and_binding_agree_on_sizes():
    module = native.module()
    assert compiled.CHUNK == module.route_chunk
    assert compiled.MAX_EXPERTS == module.route_max_experts and compiled.MAX_CHOSEN == module.route_max_chosen


def test_one_launch_each_way(monkeypatch):
    if not native.has_cuda():
        pytest.skip(native.why_not())
    logits = torch.zeros(600, 4, requires_grad=True)

    def both_ways():
        found = route_experts(logits, 2, backend="native")
        torch.autograd.backward((found.weights, found.load), (found.weights.detach(), found.load.detach()))

    monkeypatch.setattr(calls, "stream_of", lambda x: 0)
    assert native.module().count_launches(both_ways) == 2
    index = torch.zeros(600, 2, dtype=torch.int64)
    plan = lambda: plan_experts(index, torch.ones(600, 2), 4, backend="native")  # noqa: E731
    assert native.module().count_launches(plan) == 1


@pytest.mark.gpu
def test_graph_capture(generator):
    logits = torch.randn(3000, 4, generator=generator, device="cpu").cuda()
    for _ in range(2):
        route_experts(logits, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = route_experts(logits, 2)
    logits.copy_(torch.randn(3000, 4, generator=generator).cuda())
    graph.replay()
    compare(found, route_experts(logits, 2), 0.0)


FORKED = """
import os, torch
from prism_fast.ops import route_experts
torch.set_num_threads(2)
logits = torch.randn(1 << 14, 8)
here = route_experts(logits, 2, backend="native")
if os.fork() == 0:
    again = route_experts(logits, 2, backend="native")
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(here, again)) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_computes_on_its_own_threads():
    """It has none of those that the parent computed with, and must not wait for them."""
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
