"""The compiled log-probability from logits against the executable specification and against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_fast.ops import native, selected_logprob
from prism_fast.ops.reference.selected_logprob import selected_logprob as reference

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native.selected_logprob import _forms, _gradient_operator, run
from tests.support.poison import poisoned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(generator, n, vocabulary, dtype, device="cpu", scale=3.0):
    logits = (scale * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)).to(dtype).to(device)
    target = torch.randint(0, vocabulary, (n,), generator=generator)
    g, ge = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    if n > 5:
        target[1], target[4] = -100, -100
        g[2], ge[2], g[3], ge[5] = 0.0, 0.0, 0.0, 0.0
    return logits.requires_grad_(), target.to(device), g.to(device), ge.to(device)


def evaluate(function, logits, target, g, ge, *, entropy=True, temperature=1.0):
    """logp, entropy and the gradient under upstream gradients g and ge."""
    found = function(logits, target, temperature=temperature, entropy=entropy, ignore_index=-100)
    total = (found.logp * g.to(found.logp.dtype)).sum()
    if entropy:
        total = total + (found.entropy * ge.to(found.logp.dtype)).sum()
    return [found.logp.detach(), found.entropy.detach(), torch.autograd.grad(total, logits)[0]]


def assert_parity(found, wanted, dtype, **options):
    kinds = [torch.float64 if dtype == torch.float64 else torch.float32] * 2 + [dtype]
    for ours, theirs, kind in zip(found, wanted, kinds, strict=True):
        assert ours.dtype == theirs.dtype == kind
        tolerance = TOLERANCE[kind]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 1), (9, 2), (6, 17), (8, 511), (7, 512), (6, 513), (6, 4099)])
def test_parity(shape, dtype, device, generator):
    n, vocabulary = shape
    x = inputs(generator, n, vocabulary, dtype, device)
    rows = torch.rand(n, generator=generator, dtype=torch.float64).to(device) + 0.5
    for temperature, entropy in itertools.product((1.0, 0.7, rows, rows.float(), rows.sum() + 1), (True, False)):
        options = {"temperature": temperature, "entropy": entropy}
        assert_parity(evaluate(run, *x, **options), evaluate(reference, *x, **options), dtype)
    assert_parity(evaluate(run, x[0], x[1].int(), *x[2:]), evaluate(reference, *x), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large", "equal", "one_hot", "very negative", "banned", "rising"])
def test_adversarial_logits(kind, dtype, device, generator):
    """Against float64: no worse than twice the error of eager PyTorch in that dtype (in half precision: no worse)."""
    n, v = 12, 1000
    logits, target, g, ge = inputs(generator, n, v, torch.float64)
    logits = logits.detach() * {"large": 3000.0}.get(kind, 1.0)
    if kind == "equal":
        logits = torch.full_like(logits, 7.3)
    elif kind == "one_hot":
        logits = torch.zeros_like(logits).scatter_(1, target.clamp(min=0)[:, None], 60.0)
    elif kind == "very negative":
        logits = logits - 1e4
    elif kind == "banned":
        logits[:, ::3] = -torch.inf
        target = torch.where(target < 0, target, target // 3 * 3 + 1)
        target[6] = g[6] = 0
        ge *= 10
    elif kind == "rising":  # the maximum moves from chunk to chunk
        logits = logits + torch.linspace(-50, 50, v, dtype=torch.float64)
    low = logits.to(dtype).to(device).requires_grad_()
    target, g, ge = target.to(device), g.to(device), ge.to(device)
    found = evaluate(run, low, target, g, ge)
    exact = low.detach().double().requires_grad_()
    wanted = evaluate(reference, exact, target, g, ge)
    assert (found[0] <= 0).all()
    kept = target != -100

    def eager(x):
        full = torch.log_softmax(x, -1)
        h = -(full.exp() * full).nan_to_num(0.0).sum(-1)
        logp = full.gather(1, target.clamp(min=0)[:, None])[:, 0]
        return [logp.detach(), h.detach()]

    if kind == "banned":
        kept = kept & (target != 0)
        assert found[2][:, ::3].eq(0).all()
    theirs = eager(low.detach())
    for ours, rival, truth in zip(found[:2], theirs, wanted[:2], strict=True):
        error, other = ((y.double() - truth)[kept].abs().max().item() for y in (ours, rival))
        floor = 4 * torch.finfo(ours.dtype).eps * truth[kept].abs().clamp(min=1.0).max().item()
        assert error <= (1 if dtype.itemsize == 2 else 2) * other + floor, (error, other)
    scale = wanted[2].abs().max().item()
    assert (found[2].double() - wanted[2])[kept].abs().max() <= 4 * torch.finfo(dtype).eps * max(scale, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values_are_nan_in_their_own_row(dtype, device, generator):
    logits, target, g, ge = inputs(generator, 9, 700, dtype, device)
    value = logits.detach().clone()
    value[0, 3], value[6, 600], value[7], value[8, 5] = torch.nan, torch.inf, -torch.inf, 1.0
    target[8] = 700
    x = (value.requires_grad_(), target, g, ge)
    found, wanted = evaluate(run, *x), evaluate(reference, *x)
    assert_parity(found, wanted, dtype)
    assert found[0].isnan().tolist() == [True, *[False] * 5, True, True, True]
    assert found[1].isnan().tolist() == [True, *[False] * 5, True, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_may_begin_or_end_with_banned_tokens(dtype, device, generator):
    """Whole chunks of -infinity on either side; a NaN among them is not overlooked."""
    logits, target, g, ge = inputs(generator, 6, 3000, dtype, device)
    value = logits.detach().clone()
    value[:3, :2000] = value[3:, 1000:] = -torch.inf
    value[2, 1] = value[5, 2999] = torch.nan
    target = torch.tensor([2000, 2999, 2500, 0, 999, 5], device=device)
    x = (value.requires_grad_(), target, g, ge)
    found = evaluate(run, *x)
    assert_parity(found, evaluate(reference, *x), dtype)
    assert found[0].isnan().tolist() == found[1].isnan().tolist() == [False, False, True] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_and_idle_rows_are_exactly_zero_and_not_read(device, generator):
    logits, target, g, ge = inputs(generator, 9, 65, torch.float32, device)
    value = logits.detach().clone()
    value[1] = torch.nan  # ignored
    value[2] = torch.nan  # both upstream gradients are 0
    found = evaluate(run, value.requires_grad_(), target, g, ge)
    assert found[0][1] == 0 and found[1][1] == 0 and found[2][1:3].eq(0).all()
    assert found[2][[0, 3, 5, 6, 7, 8]].ne(0).any(1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(dtype, device, generator):
    for shift in (1, 3, 8):
        wide = inputs(generator, 6, 300 + shift, dtype, device)[0].detach()
        _, target, g, ge = inputs(generator, 6, 300, dtype, device)
        view = wide[:, shift:].requires_grad_()
        dense = view.detach().contiguous().requires_grad_()
        turned = view.detach().t().contiguous().t().requires_grad_()
        wanted = evaluate(run, dense, target, g, ge)
        for other in (view, turned):
            found = evaluate(run, other, target, g, ge)
            tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(dtype, device, generator):
    x = inputs(generator, 9, 131, dtype, device)
    wanted = evaluate(run, *x)
    with poisoned(float("nan")):
        found = evaluate(run, *x)
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(found, wanted, strict=True))


def test_threads_do_not_change_a_bit(generator):
    x = inputs(generator, 300, 700, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(run, *x))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_probabilities_sum_to_one(generator):
    for dtype in (torch.float32, torch.bfloat16):
        row = (8 * torch.randn(1, 4096, generator=generator)).to(dtype)
        logp = run(row.expand(4096, -1), torch.arange(4096), temperature=0.8, entropy=False, ignore_index=-100).logp
        assert abs(logp.double().exp().sum().item() - 1.0) < 1e-6


TIES = [1 + k / 2**bits for bits in (8, 11) for k in (1, 3)]  # halfway between two numbers of bfloat16 and float16


@pytest.mark.parametrize("value", [*TIES, 0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e-7, 6e-8, 3e-8, 2.9e-8, 5.9604645e-8])
def test_half_precision_gradients_round_as_pytorch_does(value):
    """Two equal logits: the gradient is +-g/2, so any number can be made to pass through the rounding."""
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
        logp = run(logits, torch.tensor([0]), temperature=1.0, entropy=False, ignore_index=-100).logp
        found = torch.autograd.grad(logp, logits, torch.tensor([2 * value]))[0]
        assert found.tolist() == torch.tensor([[value, -value]]).to(dtype).tolist()


def test_all_half_precision_numbers_are_read_right():
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite() & (every <= 1.0)]
        logits = torch.stack((torch.ones_like(every), every), 1)
        ones = torch.ones(len(every), dtype=torch.int64)
        logp = run(logits, ones, temperature=1.0, entropy=False, ignore_index=-1).logp
        wanted = torch.log_softmax(logits.double(), -1)[:, 1]
        torch.testing.assert_close(logp.double(), wanted, rtol=1e-6, atol=1e-7)


def test_operator_registration(generator):
    logits, target, g, ge = inputs(generator, 7, 11, torch.float64)
    rows = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forms.operator, (logits, target, rows, 1.0, True, -100), test_utils=tests)
    _, h, top, log_sum = _forms.operator(logits.detach(), target, rows, 1.0, True, -100)
    torch.library.opcheck(_gradient_operator, (logits.detach(), target, rows, 1.0, -100, h, top, log_sum, g, ge))


def test_compiles_once_for_all_lengths_and_temperatures(generator):
    def step(logits, target, temperature):
        return selected_logprob(logits, target, temperature=temperature, entropy=True, backend="native")

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(n, v, temperature):
        logits, target, *_ = inputs(generator, n, v, torch.float64)
        found, wanted = (f(logits, target, torch.tensor(temperature)) for f in (compiled, step))
        slopes = [torch.autograd.grad(r.logp.sum() + 2 * r.entropy.sum(), logits)[0] for r in (found, wanted)]
        assert found.logp.equal(wanted.logp) and found.entropy.equal(wanted.entropy) and slopes[0].equal(slopes[1])

    check(8, 20, 0.7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(13, 33, 0.9)
        check(50, 7, 1.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_capture_and_no_synchronisation(dtype, generator):
    x = inputs(generator, 64, 1003, dtype, "cuda")
    evaluate(run, *x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(run, *x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evaluate(run, *x)
    for _ in range(3):
        fresh = inputs(generator, 64, 1003, dtype, "cuda")
        with torch.no_grad():
            for held, value in zip(x, fresh, strict=True):
                held.copy_(value)
        graph.replay()
        assert all(a.equal(b) for a, b in zip(out, evaluate(run, *fresh), strict=True))


@pytest.mark.gpu
def test_gpu_agrees_with_the_twin_beyond_two_to_the_31_elements(generator):
    n, v = 14200, 151936  # more than 2^31 logits in bf16
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    tail, target, g, ge = inputs(generator, 8, v, torch.bfloat16)
    logits[-8:] = tail.detach().cuda()
    targets = torch.full((n,), -100, device="cuda")
    targets[-8:] = target.cuda()
    weight, weight_h = (torch.cat((torch.zeros(n - 8), y.float())).cuda() for y in (g, ge))
    found = evaluate(run, logits.requires_grad_(), targets, weight, weight_h)
    assert_parity([x[-8:].cpu() for x in found], evaluate(run, tail, target, g, ge), torch.bfloat16)
