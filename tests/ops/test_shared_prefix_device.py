"""The GPU's decomposition of shared-prefix attention: offsets and algebra with kernels played on the CPU in float64,
its calls of the real kernels by meta tensors, and the real thing where there is a GPU."""

from __future__ import annotations

import inspect

import pytest
import torch

from prism_fast.ops import shared_prefix_attention
from prism_fast.ops.stock import device_calls, varlen
from prism_fast.ops.stock import shared_prefix_attention as stock
from tests.ops.test_shared_prefix_attention import SHAPES, layout_of, tokens, unshared
from tests.support import varlen_kernels

KERNELS = {
    "flash": varlen.Kernel(varlen.flash_forward, varlen.flash_backward),
    "efficient": varlen.Kernel(varlen.efficient_forward, varlen.efficient_backward),
}
REAL = {name: getattr(varlen, f"_{name}") for name in ("flash_forward", "flash_backward")}
REAL |= {name: getattr(varlen, f"_{name}") for name in ("efficient_forward", "efficient_backward")}
# Besides the shapes of every backend: groups that a budget packs together, prefixes behind and between, branches of
# one token, a prefix that nobody sees, an empty prefix where another one starts.
LAYOUTS = SHAPES | {
    "three groups": [(5, -1), (3, 0), (1, 0), (7, 0), (1, -1), (2, 4), (6, -1), (1, 6), (1, 6)],
    "prefixes in another order than their branches": [(2, 5), (3, 4), (4, 5), (2, -1), (3, -1), (5, -1), (1, 4)],
    "a prefix without branches beside an empty one": [(0, -1), (4, -1), (2, 0), (3, 1), (2, -1), (0, 4)],
    "branches of one token": [(1, -1), (1, 0), (1, 0), (1, 0)],
}


@pytest.fixture(params=varlen_kernels.PLAYED)
def played(request, monkeypatch):
    """Tensors on the CPU take the GPU's calls, and its kernels are played."""
    kernel = varlen_kernels.played_kernels(monkeypatch, request.param)
    monkeypatch.setattr(device_calls, "kernel_for", lambda *who: kernel)
    monkeypatch.setattr(stock, "host_calls", None)
    monkeypatch.setattr(stock, "_calls", lambda q, *layout: device_calls.device_calls(q, *layout))
    return request.param


def composed(q, k, v, segments, scale=None):
    return shared_prefix_attention(q, k, v, layout_of(segments), scale=scale, backend="stock")


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_repeated_prefix(played, name, generator):
    segments = LAYOUTS[name]
    q, k, v = tokens(generator, segments, heads=6, key_heads=2, width=8, value_width=8)
    found, wanted = composed(q, k, v, segments, 0.3), unshared(q, k, v, segments, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(wanted, (q, k, v), upstream),
        rtol=1e-11,
        atol=1e-13,
    )


def test_without_a_bound_of_the_queries_the_row_is_one(played, generator):
    segments = LAYOUTS["three groups"]
    q, k, v = tokens(generator, segments, width=8, value_width=8)
    layout = layout_of(segments)
    assert layout.max_queries == 11 < len(q)
    found = shared_prefix_attention(q, k, v, layout._replace(max_queries=None), backend="stock")
    torch.testing.assert_close(found, unshared(q, k, v, segments), rtol=1e-12, atol=1e-13)


def test_strided_offsets(played, generator):
    segments = LAYOUTS["three groups"]
    q, k, v = tokens(generator, segments, width=8, value_width=8)
    layout = layout_of(segments)
    strided = layout._replace(**{name: getattr(layout, name).repeat_interleave(2)[::2] for name in layout._fields[:4]})
    found = shared_prefix_attention(q, k, v, strided, backend="stock")
    torch.testing.assert_close(found, unshared(q, k, v, segments), rtol=1e-12, atol=1e-13)


def test_padding_is_zero_without_gradient(played, generator):
    segments = LAYOUTS["three groups"]
    q, k, v = tokens(generator, [*segments, (4, -1)], width=8, value_width=8)
    out = composed(q, k, v, segments)
    torch.testing.assert_close(out[:-4], unshared(q[:-4], k[:-4], v[:-4], segments), rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not out[-4:].any() and not any(g[-4:].any() for g in gradients) and all(g.any() for g in gradients)


@pytest.mark.parametrize("padding", [0, 3])
def test_nothing_to_do(played, padding):
    for segments in ([], [(0, -1)], [(0, -1), (0, 0)]):
        q = torch.randn(padding, 2, 8, dtype=torch.float64, requires_grad=True)
        out = composed(q, q, q, segments)
        out.sum().backward()
        assert not out.any() and not q.grad.any()


def test_a_branch_changes_no_bit_of_the_others(played, generator):
    segments = [(6, -1), (9, 0), (8, 0), (1, 0), (5, -1), (4, 4)]
    inputs = [x.detach() for x in tokens(generator, segments, width=8, value_width=8)]
    upstream, changed = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64), slice(6, 15)

    def run():
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = composed(*leaves, segments)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    base = run()
    for x in inputs:
        x[changed] = 30 * torch.randn(x[changed].shape, generator=generator, dtype=torch.float64)
    for moved, before in zip(run(), base, strict=True):
        assert torch.equal(moved[15:24], before[15:24]) and torch.equal(moved[24:], before[24:])
        assert not torch.equal(moved[changed], before[changed])
    assert torch.equal(run()[0][:6], base[0][:6])


def test_any_strides_and_an_expanded_gradient(played, generator):
    segments = LAYOUTS["three groups"]
    inputs = [x.detach() for x in tokens(generator, segments, width=8, value_width=8)]
    strided = [x.movedim(0, 2).contiguous().movedim(2, 0).requires_grad_() for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(
        torch.autograd.grad(composed(*strided, segments).sum(), strided),
        torch.autograd.grad(unshared(*leaves, segments).sum(), leaves),
        rtol=1e-11,
        atol=1e-13,
    )


def test_no_key_or_value_is_copied(played, generator, monkeypatch):
    """The kernels get the caller's keys and values, by address."""
    segments = LAYOUTS["three groups"]
    q, k, v = (x.detach() for x in tokens(generator, segments, width=8, value_width=8))
    seen = []

    def spy(right, at):
        def spied(*arguments):
            seen.append({x.data_ptr() for x in arguments[at : at + 2]})
            return right(*arguments)

        return spied

    for name, at in (("attend", 1), ("gradients", 2)):
        monkeypatch.setattr(varlen_kernels, name, spy(getattr(varlen_kernels, name), at))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    composed(*leaves, segments).sum().backward()
    calls = 4 * (2 if played == "efficient" else 1)  # both kinds, forward and backward; one per member of a group
    assert seen == [{k.data_ptr(), v.data_ptr()}] * calls


@pytest.mark.parametrize("name", REAL)
def test_the_played_kernels_take_what_pytorch_takes(name):
    """Positional arguments by number, keywords by name, as the installed PyTorch declares them."""
    declared = REAL[name].default._schema.arguments
    ours = inspect.signature(getattr(varlen_kernels, name)).parameters.values()
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    # Arguments before the star, and of those with a default none that we give.
    assert len(positional) == sum(not a.kwarg_only and (not a.has_default_value() or a.name == "compute_log_sumexp")
                                  for a in declared)  # fmt: skip
    assert {p.name for p in ours if p.kind == p.KEYWORD_ONLY} <= {a.name for a in declared if a.kwarg_only}
    assert all(a.kwarg_only for a in declared if a.name == "scale")


@pytest.mark.parametrize(("kernel", "dtype"), [("flash", torch.bfloat16), ("efficient", torch.float32)])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_shapes_and_dtypes_of_the_real_kernels(kernel, dtype, width, monkeypatch):
    """PyTorch's own meta implementations of the kernels accept every call; results have the shapes we rely on. Nothing
    asks for a value on the device: meta tensors have none."""
    segments = LAYOUTS["three groups"]
    layout, rows = layout_of(segments), sum(n for n, _ in segments)
    monkeypatch.setattr(device_calls, "kernel_for", lambda *who: KERNELS[kernel])
    q, k, v, grad = (torch.empty((rows, h, width), dtype=dtype, device="meta") for h in (8, 2, 2, 8))
    own, joined, _ = device_calls.device_calls(q, *(x.to("meta") for x in layout[:4]), *layout[4:7])
    for call in (*own, *joined):
        out, lse = call.attend(q, k, v, 0.1)
        assert out.shape == q.shape and out.dtype == dtype
        assert lse.shape == (rows, 8) and lse.dtype == torch.float32
        if kernel == "flash":  # PyTorch's meta implementation of the other one's backward has lost an argument
            found = call.gradients(grad, q, k, v, out, lse, 0.1)
            assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
            assert all(x.dtype == dtype for x in found)


def test_the_efficient_backward_is_called_by_its_declaration(generator, monkeypatch):
    """On the CPU PyTorch checks a call against the declaration before it says that there is no such kernel."""
    segments = LAYOUTS["three groups"]
    monkeypatch.setattr(device_calls, "kernel_for", lambda *who: KERNELS["efficient"])
    q, k, v = (x.detach().float() for x in tokens(generator, segments, width=8, value_width=8))
    for calls in device_calls.device_calls(q, *layout_of(segments)[:7])[:2]:
        with pytest.raises(NotImplementedError, match="with arguments from the 'CPU' backend"):
            calls[0].gradients(q, q, k, v, q, q[..., 0], 0.1)


@pytest.fixture
def warns():
    """What a run on CUDA asks for: deterministic algorithms, a warning where there is none."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode(before)


def test_bits_repeat_where_a_warning_is_asked_for(played, generator, monkeypatch):
    """PyTorch's kernels take another order of sums then: their backward must see the strict demand, and only it."""
    segments, seen, right = LAYOUTS["three groups"], [], varlen_kernels.gradients

    def gradients(*arguments):
        seen.append((torch.get_deterministic_debug_mode(), torch.are_deterministic_algorithms_enabled()))
        return right(*arguments)

    monkeypatch.setattr(varlen_kernels, "gradients", gradients)
    q, k, v = tokens(generator, segments, width=8, value_width=8)
    before = torch.get_deterministic_debug_mode()
    try:
        for mode in (0, 1, 2):
            torch.set_deterministic_debug_mode(mode)
            composed(q, k, v, segments).sum().backward()
            assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(before)
    strict = [x if played == "flash_attn" else 2 * (x > 0) for x in (0, 1, 2)]  # the package is told itself
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys((mode, mode > 0) for mode in strict))


class Card:
    """As much of a CUDA tensor as the choice of a kernel looks at."""

    def __init__(self, dtype, width):
        self.dtype, self.shape, self.device = dtype, (4, 2, width), "cuda"


def chosen(card):
    return varlen.kernel_for(card, "an op", "another")


def test_the_kernel_is_chosen_by_dtype_and_card_and_the_rest_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype in (torch.bfloat16, torch.float16):
        assert chosen(Card(dtype, 128)) == KERNELS["flash"]
    assert chosen(Card(torch.float32, 6)) == KERNELS["efficient"]
    with pytest.raises(
        NotImplementedError, match="an op on CUDA takes bfloat16, float16 or float32, got torch.float64; use another"
    ):
        chosen(Card(torch.float64, 64))
    for width in (100, 264):
        with pytest.raises(NotImplementedError, match=f"multiple of 8 up to 256, got {width}; use another"):
            chosen(Card(torch.bfloat16, width))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen(Card(torch.float16, 100)) == KERNELS["efficient"]


@pytest.mark.gpu
@pytest.mark.parametrize("choice", varlen_kernels.CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_error_against_float64_is_that_of_eager_attention_on_the_card(dtype, width, choice, generator, warns):
    """Within twice the error of PyTorch's attention over the repeated prefix, plus 4 units in the last place; the same
    bits twice where a run asks for them; a branch changes no bit of the others."""
    segments = [(200, -1), (170, 0), (1, 0), (0, 0), (130, 0), (150, -1), (1, -1), (129, 5), (90, 5), (40, -1)]
    inputs = [x.detach().to("cuda", dtype) for x in tokens(generator, segments, 4, 2, width, width)]
    upstream = torch.randn(inputs[0].shape, generator=generator).to("cuda", dtype)
    layout = layout_of(segments)
    layout = type(layout)(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in layout))

    def run(attention, kind):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(kind)))]

    def stock_on_card(*x):
        return shared_prefix_attention(*x, layout, backend="stock")

    exact = run(lambda *x: unshared(*x, segments), torch.float64)
    eager = run(lambda *x: unshared(*x, segments), dtype)
    with varlen_kernels.on_the_card(choice, dtype):
        ours, again = run(stock_on_card, dtype), run(stock_on_card, dtype)
        isolated(stock_on_card, inputs, generator)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    unit = torch.finfo(dtype).eps
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * unit * c.norm()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * unit * c.abs().max()


def isolated(attention, inputs, generator):
    base = attention(*inputs)
    inputs = [x.clone() for x in inputs]
    for x in inputs:
        x[200:370] = torch.randn(x[200:370].shape, generator=generator).to(x)  # the first branch
    moved = attention(*inputs)
    assert torch.equal(moved[:200], base[:200]) and torch.equal(moved[370:], base[370:])
    assert not torch.equal(moved[200:370], base[200:370])
