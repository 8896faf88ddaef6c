from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.synthetic import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A complete run with all stages, evaluations and rollouts; tests may damage it."""
    return write_run(tmp_path / "run")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, shared: only its report may be written."""
    return write_run(tmp_path_factory.mktemp("finished") / "run")
