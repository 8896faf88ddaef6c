"""Shared-prefix attention on a card: nothing asks the host, and a captured graph follows its offsets."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import PrefixLayout, shared_prefix_attention
from tests.ops.test_shared_prefix_attention import layout_of

# Two rows of as many tokens, segments and prefixes with the same bounds: all that a graph is captured for.
ROWS = (
    [(150, -1), (120, 0), (1, 0), (70, 0), (90, -1), (130, 4), (40, 4)],
    [(80, -1), (60, 0), (130, 0), (150, -1), (41, 3), (90, 3), (50, 3)],
)


def inputs(number: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, torch.Tensor]:
    generator, layout = torch.Generator().manual_seed(number), layout_of(ROWS[number])
    tokens = int(layout.cu_branch[-1])
    shapes = {"q": (tokens, 4, 64), "k": (tokens, 2, 64), "v": (tokens, 2, 64), "upstream": (tokens, 4, 64)}
    found = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    found |= dict(zip(PrefixLayout._fields, layout[:4], strict=False))
    return {name: x.to(device).requires_grad_(name in ("q", "k", "v")) for name, x in found.items()}


def step(x: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
    leaves = [x[name] for name in ("q", "k", "v")]
    layout = PrefixLayout(*(x[name] for name in PrefixLayout._fields[:4]), max_prefix=150, max_branch=150)
    out = shared_prefix_attention(*leaves, layout, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, x["upstream"])


def test_the_rows_differ_where_a_graph_must_follow():
    one, two = (inputs(number, torch.float32, "cpu") for number in (0, 1))
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}
    changed = one | {name: two[name] for name in PrefixLayout._fields[:4]}
    for a, b in zip(step(one, "stock"), step(changed, "stock"), strict=True):
        assert (a - b).norm() > 0.1 * a.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("stock", torch.bfloat16), ("stock", torch.float32)],
    ids=["triton", "stock, flash", "stock, efficient"],
)
def test_no_synchronisation_and_capture(backend, dtype):
    x, other = inputs(0, dtype), inputs(1, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, backend)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, backend)
    with torch.no_grad():
        for name, value in x.items():
            value.copy_(other[name])
    graph.replay()
    # FlashAttention adds up query gradients in any order.
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(captured, step(other, backend), rtol=tolerance, atol=tolerance)
