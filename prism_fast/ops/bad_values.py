"""Values that an op cannot refuse, because looking at them would make the host wait: counted on the device instead.

A target outside the vocabulary gives NaN where it is used, and adds one to a counter of its device; so do offsets that
cut no sequences. Whoever reads metrics reads the counter with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS: dict[torch.device, Tensor] = {}


def bad_values(device: torch.device | str = "cpu") -> int:
    """Targets outside the vocabulary, and calls with bad ``cu_seqlens``, that ops have met on ``device`` since the last
    call. Waits for the device.

    Counted by each forward pass (a replayed CUDA graph too): targets by linear_logprob, selected_logprob and
    linear_policy_loss; offsets that do not ascend from 0 to at most N by policy_loss and importance_weights, and by
    linear_policy_loss once per wave and once more. The counter comes into being with the first such call, which must
    not be a capture.
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
    """``bad`` [N] bool itself, its true entries added to the counter."""
    # Transforms of torch.func let nothing captured be written to; an operator gets the plain tensor below them.
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return _operator(bad) if hidden else _counted(bad)


def _counted(bad: Tensor) -> Tensor:
    if type(bad) is Tensor and bad.device.type != "meta":  # not while shapes are traced
        counter(bad.device).add_(bad.sum())
    return bad


# The counter is no argument, so compilers see a function without side effects; its result is used, so they keep it.
@torch.library.custom_op("prism_fast::count_bad_values", mutates_args=())
def _operator(bad: Tensor) -> Tensor:
    return _counted(bad).clone()


@_operator.register_fake
def _(bad: Tensor) -> Tensor:
    return torch.empty_like(bad)
