"""The tests of ops that have compiled kernels run twice: against the specification, and with the default backend."""

from __future__ import annotations

import pytest

from prism_fast.ops import backend

TWICE = ("test_logprob", "test_pairwise_loss", "test_policy_loss", "test_policy_loss_vectors")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in TWICE:
        metafunc.parametrize("op_backend", ["reference", "default"], indirect=True)


@pytest.fixture(autouse=True)  # a fixture whose name is added to a test's while it is generated is never set up
def op_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(request, "param"):
        monkeypatch.setenv(backend.ENVIRONMENT, "reference" if request.param == "reference" else "")
