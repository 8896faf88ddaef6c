"""Joining the ranks that a launcher started: torchrun, DeepSpeed's launcher, or ``srun`` with the same variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from prism_fast.engine.watchdog import Watchdog
from prism_fast.engine.world import World

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_ranks() -> int:
    """How many ranks the launcher started, 1 without one. Raises ValueError where its variables are not complete."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in VARIABLES if name not in os.environ]
    if ranks > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={ranks}, but {', '.join(missing)} is not set: start the ranks with torchrun, the deepspeed "
            "launcher, or set all of " + ", ".join(VARIABLES)
        )
    return ranks


def check_launch(kind: str, device: str) -> None:
    """Raise ValueError where ``engine.kind`` or ``device`` do not go with the ranks that were started."""
    ranks = started_ranks()
    if kind == "local" and ranks > 1:
        raise ValueError(
            f"engine.kind=local is one process, but {ranks} ranks were started: set engine.kind=deepspeed, or start "
            "prism-fast without a launcher"
        )
    if ranks > 1 and device.startswith("cuda:"):
        raise ValueError(f"device={device!r} would put {ranks} ranks on one GPU: use device=cuda, each takes its own")


@contextmanager
def joined(kind: str, device: str, patience: timedelta) -> Iterator[World]:
    """The world of this process, within the block: a process group over the ranks of the launcher, or of this process
    alone, and this rank's GPU. ``kind``: ``engine.kind``; local has no process group. ``patience``: how long a rank
    waits for the others.

    An error of one rank ends the others (`watchdog`).

    Raises:
        ValueError: as `check_launch`.
        SystemExit: another rank failed; it was told.
    """
    check_launch(kind, device)
    if kind == "local":
        yield World()
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu and device in ("auto", "cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if started_ranks() == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield World()
        finally:
            dist.destroy_process_group()
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    group_store = dist.PrefixStore("prism_fast/group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=patience)
    world = World(patience=patience)
    with Watchdog(store.clone(), world):
        yield world
    # After an error the others may wait in a collective: the process ends without asking them.
    dist.destroy_process_group()
