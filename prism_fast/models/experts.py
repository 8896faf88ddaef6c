"""Which of transformers' expert implementations a sparse model uses where."""

from __future__ import annotations

from torch import nn

# On the CPU the loop over hit experts wins: forward and backward of a block with T=13000, H=128, I=320, 4 experts,
# top-2, one thread take 323 ms against 437 ms (grouped_mm, 1.35x, which also has no float64); batched_mm gathers a
# weight per token and takes 110x. On CUDA the loop synchronises once per expert, grouped_mm does not.
_BY_DEVICE = {"cpu": "eager", "cuda": "grouped_mm"}


def choose_experts_for_device(model: nn.Module) -> None:
    """Select the implementation for the device that ``model`` (a Qwen3-VL-MoE model or backbone) is on, unless one from
    outside this table has been selected by hand."""
    if model.config.text_config._experts_implementation in (None, *_BY_DEVICE.values()):
        model.set_experts_implementation(_BY_DEVICE.get(model.device.type, "grouped_mm"))
