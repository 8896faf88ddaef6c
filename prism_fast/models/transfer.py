"""From host memory to a device without waiting for the work that the device has been given."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: str | torch.device) -> Tensor:
    """``x`` on ``device``. To a GPU it goes through pinned memory: a copy from pageable memory would make the host wait
    until everything queued before it is done."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
