"""Targets outside the vocabulary: NaN where they are used, counted on their device, once per forward pass."""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops
from prism_fast.ops import native

N, H, V = 9, 16, 21
TARGET = torch.tensor([0, 3, V, -1, -100, 2**32 + 1, 20, 5, 1])  # three outside; 2^32 + 1 is a token in 32 bits
CU_SEQLENS = torch.tensor([0, 4, N], dtype=torch.int32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, H, generator=generator).to(device).requires_grad_() for n in (N, V))
    return hidden, weight, TARGET.to(device)


def calls(device: str, backend: str | None) -> dict:
    """name -> call that returns something to differentiate."""
    hidden, weight, target = inputs(device)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    head = {"backend": backend} if backend != "native" else {}
    losses = {"backend": backend} if backend != "triton" else {}
    advantage = torch.ones(2, device=device)
    offsets = CU_SEQLENS.to(device)
    found = {
        "linear_logprob": lambda: ops.linear_logprob(hidden, weight, target, **head).logp.sum(),
        "recompute": lambda: ops.linear_logprob(hidden, weight, target, entropy=True, save="recompute", **head)[
            0
        ].sum(),
        "selected_logprob": lambda: ops.selected_logprob(logits, target, **losses).logp.sum(),
        "linear_policy_loss": lambda: ops.linear_policy_loss(hidden, weight, target, advantage, offsets, **head)[0],
    }
    if backend in ("native", "triton"):
        own = ("selected_logprob",) if backend == "native" else ("linear_logprob", "recompute", "linear_policy_loss")
        found = {name: found[name] for name in own}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "reference", "native", "triton"])
def test_counted_once_per_forward_pass_and_read_once(backend, device):
    if backend == "native" and not native.available():
        pytest.skip(native.why_not())
    if backend == "triton":
        pytest.importorskip("triton")
    ops.bad_values(device)
    for name, call in calls(device, backend).items():
        result = call()
        result.backward()
        assert ops.bad_values(device) == 3, name
        assert ops.bad_values(device) == 0, name
        with torch.no_grad():
            call(), call()
        assert result.isnan() and ops.bad_values(device) == 6, name


def test_good_targets_and_ignored_rows_are_not_counted():
    hidden, weight, _ = inputs("cpu")
    ops.bad_values()
    assert ops.linear_logprob(hidden, weight, torch.arange(N)).logp.isfinite().all()
    ops.linear_logprob(hidden, weight, torch.full((N,), 2**40), ignore_index=2**40)
    ops.selected_logprob(torch.zeros(2, 3), torch.tensor([-5, 2]), ignore_index=-5)
    assert ops.bad_values() == 0


@pytest.mark.parametrize("backend", ["reference", None])
def test_counted_in_compiled_graphs(backend):
    torch.compiler.reset()
    hidden, weight, _ = inputs("cpu")
    compiled = torch.compile(
        lambda t: (
            ops.linear_logprob(hidden, weight, t, backend=backend).logp.sum()
            + ops.selected_logprob(hidden, t, backend=backend).logp.sum()
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    good = torch.arange(N)
    compiled(good)  # traced
    ops.bad_values()
    compiled(good).backward()
    assert ops.bad_values() == 0
    compiled(TARGET).backward()
    assert ops.bad_values() == 3 + 4  # 20 is no column of the hidden states


@pytest.mark.gpu
def test_replayed_graphs_count_without_synchronisation():
    hidden, weight, target = inputs("cuda")
    call = lambda: ops.selected_logprob(hidden.detach(), target).logp  # noqa: E731
    call(), ops.linear_logprob(hidden.detach(), weight.detach(), target)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ops.bad_values("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    assert ops.bad_values("cuda") == 3 * 4
