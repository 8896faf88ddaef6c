"""Choice of backend, and what importing the ops costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prism_fast import ops
from prism_fast.ops import backend, native, triton

ROOT = Path(__file__).resolve().parents[2]
SCORES, GROUP = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)


def chosen(requested, tensor=SCORES, has=("reference", "native")):
    return backend.choose("an_op", has, requested, tensor)


@pytest.fixture
def machine(monkeypatch):
    """Pretend what was compiled."""

    def pretend(available: bool, cuda: bool = False):
        monkeypatch.setattr(native, "available", lambda: available)
        monkeypatch.setattr(native, "has_cuda", lambda: cuda)
        monkeypatch.setattr(native, "why_not", lambda: "the reason")

    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    return pretend


class OnDevice:
    """Stands for a tensor of a device that this machine may not have."""

    def __init__(self, name: str):
        self.device = torch.device(name)


def test_default_is_native_where_it_is_compiled(machine):
    machine(True, cuda=True)
    assert chosen(None) == "native" and chosen(None, OnDevice("cuda")) == "native"
    assert chosen("reference") == "reference" and chosen("reference", OnDevice("cuda")) == "reference"
    assert chosen(None, has=("reference",)) == "reference"
    assert chosen(None, OnDevice("meta")) == "reference"


def test_uninstalled_checkout_uses_the_reference_on_cpu_only(machine):
    machine(False)
    assert chosen(None) == "reference"
    with pytest.raises(
        RuntimeError, match="an_op: backend='native' is not available: the reason; run `prism-fast doctor"
    ):
        chosen("native")
    with pytest.raises(RuntimeError, match="CUDA tensors.*the reason.*backend='reference'"):
        chosen(None, OnDevice("cuda"))


def test_cuda_tensors_without_cuda_kernels_raise_unless_reference_is_asked_for(machine):
    machine(True, cuda=False)
    for requested in (None, "native"):
        with pytest.raises(RuntimeError, match="an_op: got CUDA tensors.*the reason"):
            chosen(requested, OnDevice("cuda"))
    assert chosen("reference", OnDevice("cuda")) == "reference"
    with pytest.raises(RuntimeError, match="runs on cpu and cuda, the tensors are on meta"):
        chosen("native", OnDevice("meta"))


def test_environment_replaces_the_default_and_obeys_the_same_rules(machine, monkeypatch):
    machine(True)
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert chosen(None) == "reference" and chosen("native") == "native"
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match="PRISM_FAST_BACKEND='cuda' is not one of 'reference', 'native', 'triton'"):
        chosen(None)
    monkeypatch.setenv(backend.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match="PRISM_FAST_BACKEND='triton', but this op has only 'reference', 'native'"):
        chosen(None)
    monkeypatch.setenv(backend.ENVIRONMENT, "")
    assert chosen(None) == "native"


def test_unknown_backend_is_refused_by_every_op():
    zeros, offsets = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    routing = ops.route_experts(torch.zeros(4, 2), 1)
    calls = {
        "linear_logprob": lambda **b: ops.linear_logprob(torch.zeros(4, 2), torch.zeros(3, 2), GROUP, **b),
        "linear_policy_loss": lambda **b: ops.linear_policy_loss(
            torch.zeros(4, 2), torch.zeros(3, 2), GROUP, zeros[:1], offsets, **b
        ),
        "linear_cross_entropy": lambda **b: ops.linear_cross_entropy(torch.zeros(4, 2), torch.zeros(3, 2), GROUP, **b),
        "selected_logprob": lambda **b: ops.selected_logprob(torch.zeros(4, 3), GROUP, **b),
        "group_advantage": lambda **b: ops.group_advantage(SCORES, GROUP, weights=[1.0], **b),
        "policy_loss": lambda **b: ops.policy_loss(zeros, zeros[:1], offsets, **b),
        "importance_weights": lambda **b: ops.importance_weights(
            zeros, zeros, offsets, mode="token_mask", low=0.0, high=2.0, **b
        ),
        "pairwise_loss": lambda **b: ops.pairwise_loss(SCORES, SCORES, GROUP, **b),
        "route_experts": lambda **b: ops.route_experts(torch.zeros(4, 2), 1, **b),
        "plan_experts": lambda **b: ops.plan_experts(GROUP[:, None], SCORES, 2, **b),
        "moe_experts": lambda **b: ops.moe_experts(
            torch.zeros(4, 3), torch.zeros(2, 4, 3), torch.zeros(2, 3, 2), routing, **b
        ),
        "shared_prefix_attention": lambda **b: ops.shared_prefix_attention(
            torch.zeros(0, 1, 2),
            torch.zeros(0, 1, 2),
            torch.zeros(0, 1, 2),
            ops.PrefixLayout(*(torch.zeros(n, dtype=torch.int32) for n in (1, 0, 0, 0)), 0, 0),
            **b,
        ),
    }
    assert set(calls) == set(ops.available())
    for name, call in calls.items():
        call()
        call(backend="reference")
        with pytest.raises(ValueError, match=f"{name}: backend='fast' is not one of"):
            call(backend="fast")
        for absent in {"native", "triton"} - set(sys.modules[getattr(ops, name).__module__].BACKENDS):
            with pytest.raises(ValueError, match=f"{name}: backend='{absent}', but this op has only"):
                call(backend=absent)


def test_triton_serves_cuda_and_is_refused_elsewhere(monkeypatch):
    has = ("reference", "triton")
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton, "available", lambda: True)
    assert chosen(None, OnDevice("cuda"), has) == chosen("triton", OnDevice("cuda"), has) == "triton"
    assert chosen(None, SCORES, has) == "reference"
    with pytest.raises(RuntimeError, match="an_op: backend='triton' needs CUDA tensors.*these are on cpu"):
        chosen("triton", SCORES, has)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("triton", SCORES, has) == "triton"
    monkeypatch.setattr(triton, "available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA tensors, but Triton is not installed"):
        chosen(None, OnDevice("cuda"), has)


def test_available_says_what_runs(machine, monkeypatch):
    machine(False)
    monkeypatch.setattr(triton, "runs_here", lambda: False)
    assert set(ops.available().values()) == {("reference",), ("reference", "stock")}
    machine(True, cuda=True)
    monkeypatch.setattr(triton, "runs_here", lambda: True)
    assert ops.available()["group_advantage"] == ("reference", "native")
    for op, backends in ops.available().items():
        module = sys.modules[getattr(ops, op).__module__]
        assert backends == module.BACKENDS, op


def test_importing_the_ops_needs_torch_alone():
    code = (
        "import sys, prism_fast.ops\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers', 'scipy', 'sklearn')]\n"
        "climbed = [m for m in sys.modules if m.startswith('prism_fast.') and not m.startswith('prism_fast.ops')]\n"
        "compiled = [m for m in sys.modules if m.startswith(('prism_fast._C', 'prism_fast.ops.native'))]\n"
        "assert not heavy + climbed + compiled, (heavy, climbed, compiled)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
