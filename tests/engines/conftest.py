"""Tests of engines that need packages of their own: `make test-engines`."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        file = tmp_path_factory.mktemp("world") / "store"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    return dist
