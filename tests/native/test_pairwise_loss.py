"""The compiled pairwise loss against the executable specification, on fresh random inputs and at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_fast.ops import native, pairwise_loss
from prism_fast.ops.reference.pairwise_loss import pairwise_loss as reference

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native.pairwise_loss import _forms, run
from tests.support.poison import poisoned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS = dict(
    valid=None, clip=None, lengths=None, length_penalty=[], l2=0.0, spread=0.0, denominator=None, l2_denominator=None
)  # fmt: skip


def batch(generator, sizes, columns, dtype=torch.float64, device="cpu", scale=4.0) -> dict:
    """Groups of these sizes in random row order; a few exact ties with the teacher and among students."""
    groups, rows = len(sizes), sum(sizes)
    teacher, student = (
        (scale * torch.randn(n, columns, generator=generator, dtype=torch.float64)).to(dtype) for n in (groups, rows)
    )
    group = torch.arange(groups).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    group = group[torch.randperm(rows, generator=generator)]
    if rows > 6:
        student[0] = teacher[group[0]]
        student[2] = student[1]
    lengths = tuple(torch.randint(1, 500, (n, columns), generator=generator).to(device) for n in (groups, rows))
    return dict(
        teacher=teacher.to(device).requires_grad_(),
        student=student.to(device).requires_grad_(),
        group=group.to(device),
        valid=(torch.rand(rows, generator=generator) < 0.7).to(device),
        lengths=lengths,
        length_penalty=[0.3, 0.1, 0.2][:columns],
    )


def evaluate(function, data: dict, **options) -> list[torch.Tensor]:
    x = OPTIONS | data | options
    sources = (x["teacher"], x["student"])
    loss, stats = function(x.pop("teacher"), x.pop("student"), x.pop("group"), **x)
    grads = torch.autograd.grad(loss * 1.7, sources, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *stats, *grads]


def assert_parity(found: list, wanted: list) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        rtol, atol = (1e-12, 1e-13) if theirs.dtype == torch.float64 else (2e-5, 2e-5)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def both(data: dict, **options) -> None:
    assert_parity(evaluate(run, data, **options), evaluate(reference, data, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_over_all_options(dtype, device, generator):
    for columns, clip, l2, spread in itertools.product((1, 3), (None, 2.5), (0.0, 0.01), (0.0, 0.1)):
        data = batch(generator, [1, 2, 16, 7, 0, 40], columns, dtype, device)
        options = dict(clip=clip, l2=l2, spread=spread)
        both(data, **options)
        both(data | {"valid": None, "lengths": None, "length_penalty": []}, **options)
        both(data, **options, denominator=7.0, l2_denominator=torch.tensor(90, device=device))
        both(data, **options, denominator=torch.tensor(0.0, device=device), l2_denominator=11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 0], [1] * 40, [600], [513, 2], [2] * 33])
@pytest.mark.parametrize("columns", [0, 2])
def test_shapes(sizes, columns, device, generator):
    data = batch(generator, sizes, columns, device=device)
    both(data, spread=0.2, l2=0.1)
    both(data | {"valid": torch.zeros_like(data["valid"])}, spread=0.2, l2=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_come_out_as_in_the_specification(device, generator):
    data = batch(generator, [4, 5], 2, device=device) | {"valid": None}
    for name in ("teacher", "student"):
        value = data[name].detach().clone()
        value[1, 0] = float("nan")
        both(data | {name: value.requires_grad_()}, clip=3.0, l2=0.1)
        found = evaluate(run, data | {name: value}, spread=0.1)
        assert found[0].isnan()
    strange = data["group"].clone()
    strange[2:4] = torch.tensor([-1, 2], device=device)
    both(data | {"group": strange}, l2=0.1)
    both(data | {"group": strange, "valid": strange.clamp(0, 1) == strange}, spread=0.1)
    nobody = torch.zeros(0, 2, dtype=torch.float64, device=device, requires_grad=True)
    both(data | {"teacher": nobody, "lengths": None, "length_penalty": []})


@pytest.mark.parametrize("device", DEVICES)
def test_invalid_students_may_hold_anything(device, generator):
    data = batch(generator, [4, 5, 6], 2, device=device)
    clean = evaluate(run, data, spread=0.1)
    value = data["student"].detach().clone()
    value[~data["valid"]] = float("nan")
    dirty = evaluate(run, data | {"student": value.requires_grad_()}, spread=0.1)
    assert all(a.equal(b) for a, b in zip(dirty, clean, strict=True))
    assert dirty[-1][~data["valid"]].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_far_scores(device):
    teacher = torch.tensor([[30.0, -30.0, 19.0, 18.0]], dtype=torch.float64, device=device, requires_grad=True)
    student = torch.tensor([[0.0, 700.0, 39.0, 39.0]], dtype=torch.float64, device=device, requires_grad=True)
    both(dict(teacher=teacher, student=student, group=torch.zeros(1, dtype=torch.int64, device=device)))


def test_quantiles_of_the_spread_term_reach_the_tails(generator):
    """One group of many: the outermost quantiles are those of 1 / (2 n)."""
    data = batch(generator, [4001], 1) | {"valid": None}
    assert_parity(evaluate(run, data, spread=1.0), evaluate(reference, data, spread=1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_every_element_is_written_and_the_workspace_is_free(poison, device, generator):
    data = batch(generator, [3, 9, 1], 2, device=device)
    wanted = evaluate(run, data, clip=3.0, l2=0.1, spread=0.1)
    with poisoned(poison):
        found = evaluate(run, data, clip=3.0, l2=0.1, spread=0.1)
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(found, wanted, strict=True))


def test_half_precision_is_lifted_and_too_many_penalties_are_refused(generator):
    data = batch(generator, [4, 5], 2, torch.bfloat16) | {"lengths": None, "length_penalty": []}
    loss, _ = run(data["teacher"], data["student"], data["group"], **(OPTIONS | {"clip": 3.0}))
    slopes = torch.autograd.grad(loss, (data["teacher"], data["student"]))
    assert loss.dtype == torch.float32 and all(s.dtype == torch.bfloat16 for s in slopes)
    wide = torch.zeros(2, 17)
    with pytest.raises(NotImplementedError, match=r"at most 16 scores, got 17; pass backend='reference'"):
        pairwise_loss(wide, wide, torch.arange(2), lengths=(wide, wide), length_penalty=0.1, backend="native")


def test_operator_registration(generator):
    data = batch(generator, [3, 4], 2)
    arguments = (
        data["teacher"], data["student"], data["group"], data["valid"], *data["lengths"], None, None,
        data["length_penalty"], True, 3.0, 0.1, 0.1, False, 0.0, False, 0.0, True,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forms.operator, arguments, test_utils=tests)


def test_compiles_once_for_all_sizes(generator):
    def step(teacher, student, group, valid, count):
        return pairwise_loss(
            teacher, student, group, valid=valid, clip=10.0, l2=1e-3, denominator=count, backend="native"
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(sizes):
        x = batch(generator, sizes, 2)
        inputs = (x["teacher"], x["student"], x["group"], x["valid"], torch.tensor(5.0))
        results = [f(*inputs) for f in (compiled, step)]
        slopes = [torch.autograd.grad(loss, inputs[:2]) for loss, _ in results]
        assert results[0][0].equal(results[1][0])
        assert all(a.equal(b) for a, b in zip(*slopes, strict=True))
        assert all(a.equal(b) for a, b in zip(results[0][1], results[1][1], strict=True))

    check([5, 9, 1])  # sizes that differ: dynamo takes equal ones for one and the same number
    with torch._dynamo.config.patch(error_on_recompile=True):
        check([8, 8, 8, 3, 2])
        check([30, 2, 4, 4])


@pytest.mark.gpu
def test_graph_capture_and_no_synchronisation(generator):
    sizes, options = [16, 16, 3, 1], dict(clip=3.0, l2=0.01, spread=0.1)
    static = batch(generator, sizes, 2, torch.float32, "cuda")
    evaluate(run, static, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(run, static, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evaluate(run, static, **options)
    for _ in range(3):
        fresh = batch(generator, sizes, 2, torch.float32, "cuda")
        with torch.no_grad():
            for name in ("teacher", "student", "group", "valid"):
                static[name].copy_(fresh[name])
            for held, value in zip(static["lengths"], fresh["lengths"], strict=True):
                held.copy_(value)
        graph.replay()
        assert all(a.equal(b) for a, b in zip(out, evaluate(run, fresh, **options), strict=True))


@pytest.mark.gpu
def test_gpu_is_deterministic_and_agrees_with_the_twin(generator):
    data = batch(generator, [16] * 100 + [700, 1], 2)
    lengths = tuple(x.cuda() for x in data["lengths"])
    on_gpu = data | {"lengths": lengths}
    for name in ("teacher", "student", "group", "valid"):
        on_gpu[name] = data[name].detach().cuda().requires_grad_(data[name].requires_grad)
    first = evaluate(run, on_gpu, spread=0.1)
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(evaluate(run, on_gpu, spread=0.1), first, strict=True))
    assert_parity([x.cpu() for x in first], evaluate(run, data, spread=0.1))
