"""AdamW as every engine runs it: what decays, the learning rate, clipping, and the refusal of a bad norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from prism_fast.engine.finite import NonFiniteError
from prism_fast.engine.optimizer import OptimizerConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def decayed(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of weights that decay: all but norms and biases. Shapes must be whole."""
    return [name for name, p in parameters.items() if p.ndim >= 2 and not name.endswith("bias")]


def make_adamw(masters: Mapping[str, Tensor], decay: Collection[str], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``masters`` by the parameters' names; those in ``decay`` decay."""
    decay = set(decay)
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in masters.items() if name in decay], "weight_decay": config.weight_decay},
            {"params": [p for name, p in masters.items() if name not in decay], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=tuple(config.betas),
        fused=True,
    )


def learning_rate(config: OptimizerConfig, schedule: Callable[[int], float] | None, updates: int) -> float:
    """Learning rate of update ``updates`` (from 0): linear warm-up ((t + 1) / warmup, never 0), then the schedule."""
    scale = min(1.0, (updates + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * scale * (schedule(updates) if schedule else 1.0)


def clip_factor(norm: float, clip_norm: float) -> float:
    """What a gradient of this norm is multiplied by; the formula of ``torch.nn.utils.clip_grads_with_norm_``."""
    return min(1.0, clip_norm / (norm + 1e-6))


def norm_error(where: str, norm: float, bad: Sequence[str]) -> NonFiniteError:
    """The error for a gradient norm that is NaN or infinite; ``bad``: parameters with such a gradient."""
    assert not math.isfinite(norm)
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return NonFiniteError(f"{where}: the gradient norm is {norm}; not finite in: {', '.join(bad[:5])}{more}")
