"""Copies from host memory to a device that do not wait for the device's queued work."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: str | torch.device) -> Tensor:
    """``x`` on ``device``. To a GPU it goes through pinned memory: a copy from pageable memory would make the host wait
    until everything queued before it is done."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
