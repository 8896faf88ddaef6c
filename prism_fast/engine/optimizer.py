"""Settings of AdamW and of its learning rate. No torch here: configurations are read without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    weight_decay: float = 0.01  # of weights with two dimensions or more; norms and biases have none
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0  # largest norm of the whole gradient
    warmup_steps: int = 0  # updates until the learning rate has risen to lr
    warmup_share: float = 0.0  # the same as a share of the stage's updates, rounded up; in place of warmup_steps
    # Of the learning rate after its rise: linear and cosine fall to 0 at the end of the stage (warm-up of the
    # discriminator: at its max_updates).
    schedule: Literal["constant", "linear", "cosine"] = "constant"
