"""How many CUDA kernels each op enqueues, counted through the host code that enqueues them. Needs no GPU."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from prism_fast.ops import group_advantage, native, pairwise_loss, policy_loss, selected_logprob
from prism_fast.ops.policy_options import CLIP_OF_LOSS, TWO_SIDED
from prism_fast.ops.reference.aggregation import OF_LOSS
from prism_fast.ops.results import PolicyStats

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native import calls
from prism_fast.ops.native import policy_loss as native_policy

ROOT = Path(__file__).resolve().parents[2]
LOGP = torch.full((9,), -0.5)
CU_SEQLENS = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
ADVANTAGE = torch.ones(3)


@pytest.fixture
def launches(monkeypatch):
    """Number of kernels that a function enqueues; the tensors stay on the CPU and nothing runs."""
    if not native.has_cuda():
        pytest.skip(native.why_not())

    def count(call) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(calls, "stream_of", lambda x: 0)
            return native.module().count_launches(call)

    return count


def advantages(normalize: str) -> None:
    options = dict(weights=torch.ones(2), valid=torch.ones(6, dtype=torch.bool), backend="native")
    group_advantage(torch.zeros(6, 2), torch.arange(6) // 3, normalize=normalize, **options)


def loss_and_gradient(**options) -> None:
    logp = LOGP.clone().requires_grad_()
    policy_loss(logp, ADVANTAGE, CU_SEQLENS, backend="native", **options)[0].backward()


def test_recipe_mode_takes_three(launches):
    """Advantages, loss with statistics, gradient."""
    assert launches(lambda: (advantages("per_score"), loss_and_gradient(old_logp=LOGP))) == 3


def test_no_mode_takes_more_than_five(launches):
    full = dict(
        old_logp=LOGP, ref_logp=LOGP, kl_coef=0.1, entropy=LOGP.clone().requires_grad_(), entropy_coef=0.1,
        is_weight=LOGP, mask=torch.ones(9), denominator=torch.tensor(3),
    )  # fmt: skip
    for normalize in ("per_score", "combined", "mean_only", "leave_one_out", "batch"):
        first = launches(lambda n=normalize: advantages(n))
        assert first == (3 if normalize == "batch" else 1)
        for loss, kl in itertools.product(OF_LOSS, ("k1", "k3+")):
            for aggregation in OF_LOSS[loss]:
                options = full | dict(loss=loss, kl=kl, aggregation=aggregation, clip=CLIP_OF_LOSS.get(loss))
                options |= {"norm_length": torch.tensor(50.0)} if aggregation.endswith("norm") else {}
                options |= {"dual_clip": 3.0} if loss in TWO_SIDED else {}
                assert first + launches(lambda o=options: loss_and_gradient(**o)) <= 5


def test_other_ops_take_one_each_way(launches):
    logits = torch.zeros(3, 7, requires_grad=True)
    target = torch.arange(3)

    def logprob():
        found = selected_logprob(logits, target, entropy=True, backend="native")
        torch.autograd.backward((found.logp, found.entropy), (torch.ones(3), torch.ones(3)))

    teacher, student = torch.zeros(2, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)

    def pairwise():
        pairwise_loss(teacher, student, torch.tensor([0, 1, 1]), l2=0.1, spread=0.1, backend="native")[0].backward()

    assert launches(logprob) == 2 and launches(pairwise) == 2


def test_counting_enqueues_nothing_and_ends(launches):
    with pytest.raises(ZeroDivisionError):
        native.module().count_launches(lambda: 1 / 0)
    loss_and_gradient(old_logp=LOGP)  # runs the CPU twin again
    assert launches(lambda: None) == 0


def test_every_launch_is_counted():
    """Kernels are enqueued in launch.cuh alone."""
    for source in (*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cuh")):
        if source.name != "launch.cuh":
            assert not re.search(r"<<<|cudaLaunch|cudaMem|Synchronize", source.read_text()), source.name


def test_no_atomics_but_two_counters():
    """Sums of whole numbers are the same in any order; nothing else may be added up by whoever comes first. The second
    counter hands out parts of a loop."""
    found = [
        (source.name, line.strip())
        for source in sorted((ROOT / "csrc").iterdir())
        for line in re.sub(r"//.*", "", source.read_text()).splitlines()
        if "atomic" in line
    ]
    assert found == [
        ("block.cuh", "atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);"),
        ("parallel.h", "#include <atomic>"),
        ("parallel.h", "std::atomic<int64_t> next{0};"),
    ]


def test_python_and_binding_agree_on_sizes():
    module = native.module()
    assert module.policy_stats == len(PolicyStats._fields) + 1 == native_policy.STATS + 1
    assert module.policy_partials == native_policy.PARTIALS
