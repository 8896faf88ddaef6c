"""What routing and experts promise on a CPU beside transformers' own, as ratios within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from prism_fast.bench.ops import experts
from prism_fast.bench.ops.measure import errors, in_float64
from prism_fast.bench.ops.memory import peak_on_cpu
from prism_fast.bench.ops.suite import OPS
from prism_fast.ops import native

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not native.available(), reason="the compiled module is not built"),
]


def in_turn(rivals: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warm_up + rounds):
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                spent[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


SHAPE = (4096, 256, 768, 4, 2)  # T, H, I, E, k
EAGER, GROUPED, OURS = "eager", "transformers grouped_mm", "prism_fast native"


def test_experts_are_ahead_of_transformers():
    """Forward and backward of the layer, 15 rounds in turn."""
    op = OPS["moe_experts"]
    x = op.inputs(SHAPE, torch.float32, "cpu")
    exact = op.run(op.exact, in_float64(x, op.leaves))
    for name in (EAGER, GROUPED, OURS):
        assert max(errors(op, op.run(op.providers[name], x), exact).values()) < 2e-6, name
    ms = in_turn({name: lambda run=op.providers[name]: op.run(run, x) for name in (EAGER, GROUPED, OURS)}, 15)
    print(ms)
    assert ms[OURS] <= 0.97 * ms[EAGER] and ms[OURS] <= ms[GROUPED] / 0.9, ms


def test_experts_take_less_memory_than_transformers():
    """Forward and backward in a process of its own."""
    memory = {name: peak_on_cpu("moe_experts", name, SHAPE, torch.float32) for name in (EAGER, GROUPED, OURS)}
    print(memory)
    assert memory[OURS] <= 0.8 * min(memory[EAGER], memory[GROUPED]), memory


@pytest.mark.parametrize(("tokens", "least"), [(4096, 5.0), (512, 2.5)])
def test_routing_is_ahead_of_softmax_topk_sort(tokens, least):
    """E 4, k 2. At 512 tokens the time is that of six allocations and the call."""
    op = OPS["route_experts"]
    x = op.inputs((tokens, 4, 2), torch.float32, "cpu")
    exact = op.run(op.exact, in_float64(x, op.leaves))
    assert max(errors(op, op.run(op.providers["prism_fast native"], x), exact).values()) < 2e-6
    with torch.no_grad():
        ms = in_turn(
            {
                "eager": lambda: experts.eager_routing(x),
                "ours": lambda: op.providers["prism_fast native"](x),
            },
            300,
            warm_up=30,
        )
    print(ms)
    assert ms["eager"] >= least * ms["ours"], ms
