"""What every test process needs before anything else is imported."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# Two test processes on a small machine must not fight over cores, and no test may reach for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads the flag when a kernel is decorated, so it has to stand before the first import of any kernel.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# The dearest files and folders. They go first, so that no worker begins one when the others have nothing left.
FIRST = ("kernels/test_kernel_forms.py", "train/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((rank for rank, name in enumerate(FIRST) if path.startswith(name)), len(FIRST))

    items.sort(key=place)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """CPU generator seeded from the test's own name: other inputs for every test, the same in every run."""
    name = request.node.nodeid.encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:4], "little")
    return torch.Generator().manual_seed(seed)
