"""Counts bad values on the device. An op cannot refuse them, because looking at them would make the host wait.

A target outside the vocabulary gives NaN in its row and adds one to a counter of its device; so do offsets that do not
delimit sequences. Code that reads metrics reads the counter with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS: dict[torch.device, Tensor] = {}


def bad_values(device: torch.device | str = "cpu") -> int:
    """Targets outside the vocabulary, and calls with bad ``cu_seqlens``, that ops have met on ``device`` since the last
    call. Waits for the device.

    Each forward pass counts, a replayed CUDA graph too. linear_logprob, selected_logprob and linear_policy_loss count
    targets; policy_loss and importance_weights count offsets that do not ascend from 0 to at most N, and
    linear_policy_loss counts these once per wave and once more. The first such call makes the counter; it must not
    happen while a CUDA graph is captured.
    """
    count = counter(torch.device(device))
    found = int(count.item())
    if found:
        count.zero_()
    return found


def counter(device: torch.device) -> Tensor:
    """int64 [], at the same address for the life of the process."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _COUNTERS.get(device)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"bad_values: the counter of {device} would be made inside a CUDA graph; call the op before capture"
            )
        found = _COUNTERS[device] = torch.zeros((), dtype=torch.int64, device=device)
    return found


def counted(bad: Tensor) -> Tensor:
    """Returns ``bad`` [N] bool after adding its true entries to the counter."""
    # torch.func transforms forbid writes to captured tensors; an operator gets the plain tensor below them.
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return _operator(bad) if hidden else _counted(bad)


def _counted(bad: Tensor) -> Tensor:
    if type(bad) is Tensor and bad.device.type != "meta":  # not while shapes are traced
        counter(bad.device).add_(bad.sum())
    return bad


# The counter is no argument, so compilers see no side effect; the result is used, so they keep the call.
@torch.library.custom_op("prism_fast::count_bad_values", mutates_args=())
def _operator(bad: Tensor) -> Tensor:
    return _counted(bad).clone()


@_operator.register_fake
def _(bad: Tensor) -> Tensor:
    return torch.empty_like(bad)
