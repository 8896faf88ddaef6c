"""DeepSpeed's configuration for the engine, and the refusals that go with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

from prism_fast.engine.settings import STAGES

SUPPORTED = ((0, 19, 5), (0, 20))  # from, below
#: Refused in ``engine.deepspeed.*``: the precision that `model.dtype` says, the optimizer's settings, and what the
#: engine's sums over micro-batches and ranks rest on.
OURS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "managed_gradient_accumulation",
        "gradient_clipping",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "prescale_gradients",
        "communication_data_type",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "amp",
        "torch_autocast",
        "data_types",
        "zero_allow_untested_optimizer",
        "zero_optimization.stage",
        "zero_optimization.overlap_comm",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "zero_optimization.round_robin_gradients",
    }
)


def import_deepspeed() -> ModuleType:
    """DeepSpeed; raises ImportError where it is missing or its version is not supported."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are about what the engine does on purpose
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of its collectives
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    cure = f"pip install 'deepspeed>={low},<{high}'"
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(f"engine.kind=deepspeed: DeepSpeed cannot be imported ({error}): {cure}") from None
    check_version(deepspeed.__version__, cure)
    return deepspeed


def check_version(version: str, cure: str) -> None:
    """Raise ImportError outside of the supported line."""
    numbers = tuple(int(part) for part in version.strip().partition("+")[0].split(".")[:3] if part.isdigit())
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise ImportError(f"engine.kind=deepspeed does not support DeepSpeed {version}: {cure}")


def deepspeed_config(stage: int, dtype: torch.dtype, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with what the engine sets.

    Raises:
        ValueError: the stage is not 1, 2 or 3; ``options`` hold one of ``OURS``.
    """
    if stage not in STAGES:
        raise ValueError(f"engine.stage must be one of {', '.join(map(str, STAGES))}, got {stage!r}")
    half = dtype.itemsize < 4
    for name in _names(options):
        if name in OURS or name.partition(".")[0] in OURS:
            raise ValueError(
                f"engine.deepspeed.{name} is set by the engine and cannot be set again: leave it out (precision: "
                "model.dtype; learning rate, clipping and decay: the stage's optimizer; stage: engine.stage)"
            )
    zero = dict(options.get("zero_optimization", {}))
    zero.setdefault("reduce_bucket_size", 50_000_000)  # elements; DeepSpeed's own default is ten times as much
    # In bfloat16 DeepSpeed has another optimizer for stage 1, which cannot coalesce reductions. As gradients are whole
    # until the step ends in either stage, stage 2 is the same.
    zero |= {"stage": 2 if stage == 1 and half else stage, "overlap_comm": False}
    return {
        **{name: value for name, value in options.items() if name != "zero_optimization"},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": stage < 3,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def _names(options: Mapping[str, Any]) -> Iterator[str]:
    """The options' names, those of ``zero_optimization`` with a dot."""
    for name, value in options.items():
        if name == "zero_optimization" and isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)
        else:
            yield name
