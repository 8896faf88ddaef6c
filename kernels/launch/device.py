"""The card a launch runs on.

Triton launches on the current device and its current stream, and asks its allocator for memory without naming a card.
Both are right only inside `on_device`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_ANYWHERE = nullcontext()


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Context in which kernels for ``x`` are launched and their scratch memory is allocated; nothing on a CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else _ANYWHERE


def card(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, compute capability × 10)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count, 10 * properties.major + properties.minor
    return 4, 90  # Triton's interpreter: enough programs to exercise the walk over tiles


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Triton's allocator for descriptors made inside a kernel; on the current device, see `on_device`."""
    return torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")
