"""Speed and memory of a step: seconds by part, tokens per second, MFU, peak memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prism_fast.track.flops import peak_flops
from prism_fast.track.metrics import Metrics


class StepTimer:
    """Measures the steps of a stage one by one, without making the host wait for the device: the code of a part ends
    by reading a result (rollouts, a gradient norm), so it has waited already."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        """``dtype``: of the models' matrix products, for the card's peak in MFU."""
        self.device = device
        self.peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
        self.begin()

    def begin(self) -> None:
        """Begin a step; earlier measurements are dropped."""
        self.seconds: dict[str, float] = {}
        self._learning, self._tokens, self._flops = 0.0, 0, 0
        self._started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def part(self, name: str, *, learns: bool = False) -> Iterator[None]:
        """Time the block as ``time/<name>``; blocks of one name add up. ``learns``: its seconds count for MFU."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._learning += spent if learns else 0.0

    def learned(self, *, tokens: int, forward_flops: int) -> None:
        """Count an update over ``tokens`` (without padding), whose forward takes ``forward_flops``."""
        self._tokens += tokens
        self._flops += 3 * forward_flops

    def metrics(self) -> Metrics:
        """Metrics of the step so far. Over ranks: the slowest time, tokens of all, the mean MFU, the largest memory.

        ``perf/peak_memory_mib``: on CUDA the peak of PyTorch's tensors in this step, on the CPU that of the process
        since its start. ``perf/mfu``: 3 x the forward's FLOPs over the seconds of the parts that learn times the card's
        peak; absent where the peak is not known.
        """
        metrics = Metrics()
        step = time.perf_counter() - self._started
        for name, seconds in {**self.seconds, "step": step}.items():
            metrics.max(f"time/{name}", seconds)
        if self._tokens:
            metrics.sum("perf/tokens_per_second", self._tokens / step)
        metrics.max("perf/peak_memory_mib", peak_memory_bytes(self.device) / 2**20)
        if self.peak is not None and self._learning:
            metrics.mean("perf/mfu", self._flops / (self._learning * self.peak))
        return metrics


def peak_memory_bytes(device: torch.device) -> int:
    """Peak on CUDA since the last reset, on the CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit


def free_memory_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of a card, whoever holds the rest; on the CPU the machine's free pages."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
