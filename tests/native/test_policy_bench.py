"""The benchmark of the policy step checks what it times, and the compiled ops keep their lead."""

from __future__ import annotations

import pytest

from bench import policy_bench
from prism_fast.ops import native

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)


@pytest.mark.parametrize("mode", policy_bench.MODES)
def test_every_provider_computes_the_same(mode):
    rows = policy_bench.measure(8, 24, mode, "cpu", seconds=0.0)
    assert [row["provider"] for row in rows] == list(policy_bench.PROVIDERS)
    assert all(row["status"] == "ok" and row["runs"] >= 10 and row["ms_p50"] > 0 for row in rows)


def test_a_wrong_result_is_named(monkeypatch):
    monkeypatch.setattr(policy_bench, "PENALTY", 1.4)
    right = policy_bench.eager
    monkeypatch.setattr(policy_bench, "eager", lambda *a, **k: (right(*a, **k)[0], right(*a, **k)[1] * 1.01))
    rows = {row["provider"]: row["status"] for row in policy_bench.measure(8, 24, "grpo", "cpu", seconds=0.0)}
    assert rows["native"] == "wrong"


@pytest.mark.long
@pytest.mark.parametrize("mode", policy_bench.MODES)
@pytest.mark.parametrize(("shape", "least"), [((16, 512), 1.5), ((64, 4096), 2.0)])
def test_lead_over_eager(shape, least, mode):
    """Medians of runs that take turns in one process: a busy machine slows both."""
    rows = {row["provider"]: row for row in policy_bench.measure(*shape, mode, "cpu", seconds=3.0)}
    assert rows["eager"]["speedup_of_native"] > least and rows["reference"]["speedup_of_native"] > least
