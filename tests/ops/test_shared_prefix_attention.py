"""shared_prefix_attention equals ordinary attention over every branch with its prefix repeated in front."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prism_fast.ops import PrefixLayout, backend, shared_prefix_attention


@pytest.fixture(params=["reference", "stock"], autouse=True)
def implementation(request, monkeypatch) -> str:
    monkeypatch.setenv(backend.ENVIRONMENT, request.param)
    return request.param


def layout_of(segments: list[tuple[int, int]]) -> PrefixLayout:
    """Segments as (length, number of the prefix segment it sees or -1) in packed order."""
    lengths = torch.tensor([length for length, _ in segments])
    start = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    prefixes = sorted({seen for _, seen in segments if seen >= 0})
    return PrefixLayout(
        cu_branch=start.int(),
        prefix_start=start[prefixes].int() if prefixes else torch.zeros(0, dtype=torch.int32),
        prefix_len=lengths[prefixes].int() if prefixes else torch.zeros(0, dtype=torch.int32),
        branch_prefix=torch.tensor([prefixes.index(p) if p >= 0 else -1 for _, p in segments], dtype=torch.int32),
        max_prefix=max((int(lengths[p]) for p in prefixes), default=0),
        max_branch=int(lengths.max()) if segments else 0,
        max_queries=max((sum(n for n, seen in segments if seen == p) for p in prefixes), default=0),
    )


def unshared(q, k, v, segments, scale=None):
    """The same result with the prefix repeated in front of every branch, by PyTorch's attention."""
    offsets = [0]
    for length, _ in segments:
        offsets.append(offsets[-1] + length)
    group = q.shape[1] // k.shape[1]
    parts = []
    for s, (length, seen) in enumerate(segments):
        own = torch.arange(offsets[s], offsets[s + 1])
        rows = own if seen < 0 else torch.cat((torch.arange(offsets[seen], offsets[seen + 1]), own))
        sub = [x[rows].movedim(0, 1)[None] for x in (q, k, v)]
        sub[1:] = [x.repeat_interleave(group, 1) for x in sub[1:]]
        out = scaled_dot_product_attention(*sub, is_causal=True, scale=scale)[0].movedim(1, 0)
        parts.append(out[len(rows) - length :])
    return torch.cat(parts)


SHAPES = {
    "one group": [(5, -1), (3, 0), (4, 0), (1, 0)],
    "two groups, a plain sequence and empty branches": [
        (4, -1),
        (2, 0),
        (0, 0),
        (6, -1),
        (3, -1),
        (1, 4),
        (5, 4),
        (0, -1),
    ],
    "ragged branches, an interrupted group and a prefix behind its branch": [
        (3, 3),
        (7, -1),
        (9, 1),
        (2, -1),
        (1, 1),
        (8, 1),
        (4, 3),
        (5, 1),
    ],
    "no prefix at all": [(3, -1), (4, -1)],
    "an empty prefix": [(0, -1), (3, 0), (2, 0)],
    "one token": [(1, -1)],
}


def tokens(generator, segments, heads=4, key_heads=2, width=6, value_width=5):
    n = sum(length for length, _ in segments)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return noise(n, heads, width), noise(n, key_heads, width), noise(n, key_heads, value_width)


@pytest.fixture(params=[False, True], ids=["one block", "blocks of queries"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("prism_fast.ops.reference.shared_prefix_attention.BLOCK_BYTES", 1000)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_repeated_prefix(name, blocks, generator):
    segments = SHAPES[name]
    q, k, v = tokens(generator, segments)
    found = shared_prefix_attention(q, k, v, layout_of(segments), scale=0.3)
    wanted = unshared(q, k, v, segments, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    g = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((found * g).sum(), (q, k, v)),
        torch.autograd.grad((wanted * g).sum(), (q, k, v)),
        rtol=1e-10,
        atol=1e-12,
    )


def test_branches_do_not_see_each_other(generator):
    segments = SHAPES["one group"]
    q, k, v = (x.detach() for x in tokens(generator, segments))
    layout = layout_of(segments)
    base = shared_prefix_attention(q, k, v, layout)
    k[8:12], v[8:12] = 7.0, -7.0  # the second branch
    moved = shared_prefix_attention(q, k, v, layout)
    assert torch.equal(base[:8], moved[:8]) and torch.equal(base[12:], moved[12:])
    assert (base[8:12] != moved[8:12]).any()


def test_branches_of_one_call_do_not_see_each_other(generator):
    """Equal bits also where ragged branches are computed together, in values and in gradients."""
    segments = [(6, -1), (9, 0), (8, 0), (9, 0), (7, 0), (1, 0), (9, 0)]
    inputs = [x.detach().float() for x in tokens(generator, segments, width=8, value_width=8)]
    layout, changed = layout_of(segments), slice(23, 32)  # the third branch
    upstream = torch.randn(49, 4, 8, generator=generator)

    def run(q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = shared_prefix_attention(*leaves, layout)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    base = run(*inputs)
    for again, before in zip(run(*inputs), base, strict=True):
        assert torch.equal(again, before)
    for x in inputs:
        x[changed] = torch.randn(x[changed].shape, generator=generator) * 30
    for moved, before in zip(run(*inputs), base, strict=True):
        assert torch.equal(moved[6:23], before[6:23]) and torch.equal(moved[32:], before[32:])
        assert not torch.equal(moved[changed], before[changed])


def test_any_strides_and_an_expanded_gradient(generator):
    segments = SHAPES["one group"]
    q, k, v = (x.detach() for x in tokens(generator, segments, value_width=6))
    layout = layout_of(segments)
    wanted = shared_prefix_attention(q, k, v, layout)
    strided = [x.movedim(0, 2).contiguous().movedim(2, 0).requires_grad_() for x in (q, k, v)]
    found = shared_prefix_attention(*strided, layout)
    torch.testing.assert_close(found, wanted)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), strided),
        torch.autograd.grad(unshared(*leaves, segments).sum(), leaves),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_that_of_eager_attention(generator, dtype):
    """Within twice the error of PyTorch's attention over the repeated prefix, plus 4 units in the last place."""
    segments = [(40, -1), (17, 0), (30, 0), (1, 0), (25, -1), (31, 4)]
    q, k, v = (x.detach() for x in tokens(generator, segments, width=16, value_width=16))
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64)

    def run(attention, kind):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (q.to(dtype), k.to(dtype), v.to(dtype))]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream.to(dtype).to(kind))
        return [x.detach().double() for x in (out, *grads)]

    exact = run(lambda *x: unshared(*x, segments), torch.float64)
    eager = run(lambda *x: unshared(*x, segments), dtype)
    ours = run(lambda *x: shared_prefix_attention(*x, layout_of(segments)), dtype)
    unit = torch.finfo(dtype).eps
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * unit * c.norm()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * unit * c.abs().max()


@pytest.mark.parametrize("size", [30, 300])
def test_large_scores_cost_no_more_than_pytorchs_own_attention(size, generator):
    """Scores of hundreds and thousands. The bound is the contract's, the eager form PyTorch's fused attention: there as
    here, backward forms probabilities from a float32 log-sum-exp, which is less exact than a softmax that is kept."""
    segments = [(200, -1), (57, 0), (130, 0), (1, 0), (40, -1)]
    inputs = [x.detach().float() for x in tokens(generator, segments, width=16, value_width=16)]
    inputs[0] *= size
    upstream = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)

    def run(attention, kind):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(kind)))]

    exact, theirs = (run(lambda *x: unshared(*x, segments), kind) for kind in (torch.float64, torch.float32))
    ours = run(lambda *x: shared_prefix_attention(*x, layout_of(segments)), torch.float32)
    unit = torch.finfo(torch.float32).eps
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * unit * c.norm()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * unit * c.abs().max()


def test_padding_is_zero_without_gradient(generator):
    segments = SHAPES["one group"]
    q, k, v = tokens(generator, [*segments, (4, -1)])
    out = shared_prefix_attention(q, k, v, layout_of(segments))
    torch.testing.assert_close(out[:13], unshared(q[:13], k[:13], v[:13], segments), rtol=1e-11, atol=1e-12)
    assert torch.equal(out[13:], torch.zeros_like(out[13:]))
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and torch.equal(x.grad[13:], torch.zeros_like(x.grad[13:]))


def test_gradcheck(generator):
    segments = [(2, -1), (2, 0), (1, 0)]
    q, k, v = tokens(generator, segments, heads=2, key_heads=1, width=3, value_width=2)
    assert torch.autograd.gradcheck(lambda *x: shared_prefix_attention(*x, layout_of(segments)), (q, k, v))


def test_no_tokens():
    layout = layout_of([])
    q = torch.zeros(0, 2, 4, requires_grad=True)
    assert shared_prefix_attention(q, q, q, layout).shape == (0, 2, 4)


def test_half_precision(generator):
    segments = SHAPES["one group"]
    q, k, v = (x.detach().bfloat16() for x in tokens(generator, segments))
    out = shared_prefix_attention(q, k, v, layout_of(segments))
    exact = shared_prefix_attention(q.double(), k.double(), v.double(), layout_of(segments))
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_refusals(generator):
    segments = SHAPES["one group"]
    q, k, v = tokens(generator, segments)
    layout = layout_of(segments)
    for message, arguments in {
        r"q must have shape \[any, any, any\]": (q[0], k, v, layout),
        r"k must have shape \[13, any, 6\]": (q, k[:-1], v, layout),
        "k must be float64, got float32": (q, k.float(), v, layout),
        "3 query heads are not a multiple of 2": (q[:, :3], k, v, layout),
        r"v must have shape \[13, 2, any\]": (q, k, v[:, :1], layout),
        "layout must be a PrefixLayout": (q, k, v, tuple(layout)),
        "layout.cu_branch must be int32, got int64": (q, k, v, layout._replace(cu_branch=layout.cu_branch.long())),
        r"layout.branch_prefix must have shape \[4\]": (
            q,
            k,
            v,
            layout._replace(branch_prefix=layout.branch_prefix[1:]),
        ),
        r"layout.prefix_len must have shape \[1\]": (q, k, v, layout._replace(prefix_len=layout.branch_prefix)),
        "layout.max_prefix=-1": (q, k, v, layout._replace(max_prefix=-1)),
        "layout.max_queries=-2": (q, k, v, layout._replace(max_queries=-2)),
    }.items():
        with pytest.raises(ValueError, match=f"shared_prefix_attention: {message}"):
            shared_prefix_attention(*arguments)


def test_padding_may_hold_anything(generator):
    """What lies past the last segment is not looked at, and gets no gradient."""
    segments = SHAPES["one group"]
    used, layout = sum(n for n, _ in segments), layout_of(SHAPES["one group"])
    q, k, v = (x.detach() for x in tokens(generator, segments))
    wanted = shared_prefix_attention(q, k, v, layout)
    for value in (torch.nan, torch.inf):
        leaves = [torch.cat((x, torch.full_like(x[:3], value))).requires_grad_() for x in (q, k, v)]
        found = shared_prefix_attention(*leaves, layout)
        torch.testing.assert_close(found[:used], wanted)
        assert not found[used:].any()
        for g in torch.autograd.grad(found.sum(), leaves):
            assert g.isfinite().all() and not g[used:].any()


def test_autocast_does_not_round_a_backward_inside_the_region(generator):
    segments = SHAPES["one group"]
    leaves = [x.detach().float().requires_grad_() for x in tokens(generator, segments)]
    layout = layout_of(segments)
    wanted = torch.autograd.grad(shared_prefix_attention(*leaves, layout).square().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(shared_prefix_attention(*leaves, layout).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
