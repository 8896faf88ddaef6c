"""Layouts whose values do not fit are refused by name on the CPU; on a GPU, played here, results are NaN. Nothing reads
outside of the row. A prepared layout gives the same bits."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import prepare_prefix_layout, shared_prefix_attention
from prism_fast.ops.prefix_layout import faults, misfit
from prism_fast.ops.reference import shared_prefix_attention as reference
from prism_fast.ops.stock import device_calls
from prism_fast.ops.stock import shared_prefix_attention as stock
from tests.ops.test_shared_prefix_attention import SHAPES, layout_of, tokens
from tests.support import varlen_kernels

SEGMENTS = [(4, -1), (3, 0), (5, 0), (2, -1), (1, 3), (2, -1)]
TOKENS = 17


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "cu_branch must start with 0": {"cu_branch": ints(1, 4, 7, 12, 14, 15, 17)},
    "cu_branch must not decrease": {"cu_branch": ints(0, 4, 7, 6, 14, 15, 17)},
    "cu_branch must end within the 17 tokens": {"cu_branch": ints(0, 4, 7, 12, 14, 15, 18)},
    "branch_prefix must be -1 or the number of one of the 2 prefixes": {"branch_prefix": ints(-1, 0, 0, -1, 2, -1)},
    "max_branch=4 must bound": {"max_branch": 4},
    "prefix_len must not be negative": {"prefix_len": ints(4, -2)},
    "prefix_start and prefix_len must be those of a segment": {"prefix_start": ints(0, 1 << 30)},
    "prefix_start and prefix_len must be": {"prefix_len": ints(5, 2), "max_prefix": 5},
    "max_prefix=3 must bound prefix_len": {"max_prefix": 3},
    "max_queries=7 must bound the tokens that see one prefix": {"max_queries": 7},
}


def inputs(generator, dtype=torch.float32):
    q, k, v = (x.detach().to(dtype) for x in tokens(generator, SEGMENTS, width=8, value_width=8))
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("backend", ["reference", "stock"])
@pytest.mark.parametrize("rule", BAD)
def test_refused_on_the_host(rule, backend, generator):
    layout = layout_of(SEGMENTS)._replace(**BAD[rule])
    with pytest.raises(ValueError, match=f"shared_prefix_attention: layout.{rule}.*cu_branch=.* for 17 tokens"):
        shared_prefix_attention(*inputs(generator), layout, backend=backend)


def played_device(monkeypatch):
    kernel = device_calls.Kernel(varlen_kernels_forward, varlen_kernels_backward)
    monkeypatch.setattr(device_calls, "kernel_for", lambda *who: kernel)
    monkeypatch.setattr(stock, "_calls", lambda q, *layout: device_calls.device_calls(q, *layout))
    monkeypatch.setattr(stock, "refuse_misfit", lambda *layout: None)


def varlen_kernels_forward(q, k, v, s, scale):
    pairs = varlen_kernels.pairs(s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, len(q), len(k))
    return varlen_kernels.attend(q, k, v, pairs, s.causal, scale)


def varlen_kernels_backward(grad, q, k, v, out, lse, s, scale):
    pairs = varlen_kernels.pairs(s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, len(q), len(k))
    return varlen_kernels.gradients(grad, q, k, v, out, lse, pairs, s.causal, scale)


@pytest.mark.parametrize("backend", ["reference", "stock", "triton"])
@pytest.mark.parametrize("rule", [None, *BAD])
def test_nan_where_nobody_looks(rule, backend, generator, monkeypatch):
    """The kernels on a device, played or interpreted: NaN everywhere, and nothing is read where it should not be."""
    if backend == "triton":
        pytest.importorskip("triton")
        from tests.support.triton_device import DEVICE

        if DEVICE != "cpu":
            pytest.skip("offsets that lie on the host")
    monkeypatch.setattr(reference, "refuse_misfit", lambda *layout: None)
    played_device(monkeypatch)
    layout = layout_of(SEGMENTS)._replace(**BAD.get(rule, {}))
    leaves = inputs(generator)
    out = shared_prefix_attention(*leaves, layout, backend=backend)
    found = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert all((x.isnan().all() if rule else x.isfinite().all()) for x in found)


@pytest.mark.parametrize("name", SHAPES)
def test_good_layouts_have_no_fault(name):
    layout = layout_of(SHAPES[name])
    total = int(layout.cu_branch[-1])
    for padding in (0, 3):
        assert not misfit(layout, total + padding)
        assert not any(faults(layout._replace(max_queries=total), total + padding).values())
    assert misfit(layout, total - 1)


@pytest.mark.parametrize("backend", ["reference", "stock", "triton"])
@pytest.mark.parametrize("scale", [0, -0.5, float("nan"), float("inf")])
def test_scales_that_are_no_positive_number_are_refused(scale, backend, generator):
    with pytest.raises(ValueError, match=r"shared_prefix_attention: scale=.* must be finite and in \(0.0, inf\]"):
        shared_prefix_attention(*inputs(generator), layout_of(SEGMENTS), scale=scale, backend=backend)


@pytest.mark.parametrize("block_bytes", [1000, 1 << 20], ids=["blocks of queries", "one block"])
@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_autocast_changes_nothing(backend, block_bytes, generator, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_BYTES", block_bytes)
    leaves, layout = inputs(generator), layout_of(SEGMENTS)

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = shared_prefix_attention(*leaves, layout, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_a_prepared_layout_is_used_and_gives_the_same_bits(generator, monkeypatch):
    pytest.importorskip("triton")
    from prism_fast.ops.triton import shared_prefix_attention as fused
    from tests.support.triton_device import DEVICE

    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs(generator)]
    layout = layout_of(SEGMENTS)
    layout = layout._replace(**{name: getattr(layout, name).to(DEVICE) for name in layout._fields[:4]})
    row = {"tokens": TOKENS, "heads": 4, "key_heads": 2, "width": 8}
    prepared = prepare_prefix_layout(layout, **row, dtype=torch.float32, backend="triton")
    other = prepare_prefix_layout(layout, **row, dtype=torch.bfloat16, backend="triton")
    assert prepare_prefix_layout(layout, **row, dtype=torch.float64, backend="triton").prepared is None
    assert prepare_prefix_layout(layout, **row, dtype=torch.float32, backend="stock").prepared is None
    made, make = [], fused._make_lists
    monkeypatch.setattr(fused, "_make_lists", lambda *x: made.append(1) or make(*x))

    def run(layout):
        out = shared_prefix_attention(*leaves, layout, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    found = run(prepared)
    assert made == []
    for wanted in (run(layout), run(other)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert made == [1, 1]
    monkeypatch.undo()
    whole = torch.compile(lambda *x: shared_prefix_attention(*x, backend="triton"), fullgraph=True, backend="eager")
    for given in (prepared, layout):
        assert torch.equal(whole(*leaves, given), found[0])
