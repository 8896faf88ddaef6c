"""Shared-prefix attention by the Triton kernels: the accuracy contract, isolation, bits, any strides and layouts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.kernels.attention import TILES, Tile, lists, tiles
from prism_fast.ops import PrefixLayout, shared_prefix_attention
from tests.ops.test_shared_prefix_attention import SHAPES, layout_of, unshared
from tests.support.triton_device import DEVICE

# Two groups; segments longer and shorter than a tile, of one token, empty, behind and before their prefix.
SEGMENTS = [(18, -1), (20, 0), (1, 0), (0, 0), (17, 5), (20, -1), (5, -1)]
TOKENS = sum(length for length, _ in SEGMENTS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter only: segments must span several tiles, the list of followers must be walked, work be cut."""
    if DEVICE == "cpu":
        small = {key: Tile(16, 16, 4, 1, 16, 32, 4, 1) for key in TILES}
        monkeypatch.setattr(tiles, "TILES", small)
        monkeypatch.setattr(tiles, "card", lambda device: (1, 90))
        monkeypatch.setattr(lists, "PART", 2)
        monkeypatch.setattr(lists, "PROGRAMS", 1)


def operands(generator, segments, heads=1, key_heads=1, width=16, dtype=torch.float32):
    n = sum(length for length, _ in segments)
    shapes = ((n, heads, width), (n, key_heads, width), (n, key_heads, width), (n, heads, width))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def moved(layout: PrefixLayout) -> PrefixLayout:
    return PrefixLayout(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in layout))


def run(attention, q, k, v, upstream):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def fused(layout, scale=None):
    return lambda *x: shared_prefix_attention(*x, layout, scale=scale, backend="triton")


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith(("two", "ragged", "an empty"))])
def test_equals_the_reference(name, generator):
    segments = SHAPES[name]
    inputs, layout = operands(generator, segments), moved(layout_of(segments))
    found = run(fused(layout, 0.3), *inputs)
    wanted = run(lambda *x: shared_prefix_attention(*x, layout, scale=0.3, backend="reference"), *inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "heads"),
    [
        (torch.float32, 40, (1, 1)),
        (torch.bfloat16, 64, (2, 1)),
        (torch.bfloat16, 96, (1, 1)),
        (torch.float16, 128, (1, 1)),
    ],
)
def test_error_against_float64_is_that_of_eager_attention(dtype, width, heads, generator):
    inputs = operands(generator, SEGMENTS, *heads, width, dtype)
    layout = moved(layout_of(SEGMENTS))
    found = run(fused(layout), *inputs)
    eager = run(lambda *x: unshared(*x, SEGMENTS), *inputs)
    exact = run(lambda *x: unshared(*x, SEGMENTS), *(x.double() for x in inputs))
    unit = torch.finfo(dtype).eps
    for a, b, c in zip(found, eager, exact, strict=True):
        assert a.dtype == dtype
        a, b = a.double(), b.double()
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * unit * c.norm()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * unit * c.abs().max()


def test_a_branch_changes_no_bit_of_the_others_and_bits_repeat(generator):
    segments = [(18, -1), (20, 0), (1, 0), (17, 0)]
    inputs, layout = operands(generator, segments), moved(layout_of(segments))
    base = run(fused(layout), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(base, run(fused(layout), *inputs), strict=True))
    changed = slice(18, 38)  # the first branch
    for x in inputs[:3]:
        x[changed] = 40 * torch.randn(x[changed].shape, generator=generator).to(DEVICE)
    for a, b in zip(run(fused(layout), *inputs), base, strict=True):
        assert torch.equal(a[38:], b[38:]) and not torch.equal(a[changed], b[changed])


def test_padding_strides_and_expanded_gradients(generator):
    segments = [(18, -1), (20, 0), (3, 0)]
    q, k, v, _ = operands(generator, [*segments, (11, -1)], heads=2)
    layout = moved(layout_of(segments))  # 11 tokens of padding
    strided = [x.movedim(0, 2).contiguous().movedim(2, 0) for x in (q, k, v)]
    one = torch.ones((), device=DEVICE).expand(q.shape)
    found = run(fused(layout), *strided, one)
    wanted = run(lambda *x: shared_prefix_attention(*x, layout, backend="reference"), q, k, v, one)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not any(x[-11:].any() for x in found)


def test_scores_of_any_size(generator):
    """Scores of several hundred: the maximum is taken off before the exponential, in both ranges."""
    segments = [(18, -1), (20, 0), (3, 0)]
    inputs, layout = operands(generator, segments), moved(layout_of(segments))
    inputs[0] *= 100
    found = run(fused(layout), *inputs)
    exact = run(lambda *x: unshared(*x, segments), *(x.double() for x in inputs))
    for a, c in zip(found, exact, strict=True):
        assert a.isfinite().all() and (a - c).norm() <= 1e-4 * c.norm()


@pytest.mark.parametrize(("memory", "heads"), [(lists.PARTIAL_BYTES, 1), (1 << 13, 2)])
def test_work_in_parts(memory, heads, generator, monkeypatch):
    """A key tile's work cut at every query tile, or into as few parts as the memory takes; sums begin as NaN."""
    monkeypatch.setattr(lists, "PART", 1)
    monkeypatch.setattr(lists, "PARTIAL_BYTES", memory)
    segments = [(40, -1), (33, 0), (18, 0)]
    inputs, layout = operands(generator, segments, heads), moved(layout_of(segments))
    wanted = run(lambda *x: shared_prefix_attention(*x, layout, backend="reference"), *inputs)
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled(torch.Tensor.new_empty))
    found = run(fused(layout), *inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def nan_filled(make):
    def made(*arguments, **options):
        x = make(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return made


def test_a_layout_of_any_strides(generator):
    segments = [(18, -1), (17, 0), (3, -1)]
    layout = moved(layout_of(segments))
    inputs = operands(generator, segments)
    spread = [torch.stack((x, x + 1), 1)[:, 0] for x in layout[:4]]
    assert not (spread[0].is_contiguous() or spread[3].is_contiguous())
    found = run(fused(PrefixLayout(*spread, *layout[4:])), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, run(fused(layout), *inputs), strict=True))


@pytest.mark.gpu
def test_another_current_device_than_the_tensors(generator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    inputs, layout = operands(generator, SEGMENTS), moved(layout_of(SEGMENTS))
    there = [x.to("cuda:1") for x in inputs]
    away = PrefixLayout(*(x.to("cuda:1") for x in layout[:4]), *layout[4:])
    with torch.cuda.device(0):
        found = run(fused(away), *there)
    for a, b in zip(found, run(fused(layout), *inputs), strict=True):
        assert torch.equal(a.to(b.device), b)


def test_refusals(generator):
    segments = [(4, -1), (2, 0)]
    layout = moved(layout_of(segments))
    q, k, v, _ = operands(generator, segments)
    with pytest.raises(NotImplementedError, match="got torch.float64, 16 and 16"):
        fused(layout)(q.double(), k.double(), v.double())
    with pytest.raises(NotImplementedError, match="16 and 8; use backend='reference'"):
        fused(layout)(q, k, v[..., :8])
    wide = operands(generator, segments, width=144)[:3]
    with pytest.raises(NotImplementedError, match="heads of at most 128"):
        fused(layout)(*wide)
