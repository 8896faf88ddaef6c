"""Settings of AdamW and of the learning rate's warm-up. No torch here: configurations are read without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    weight_decay: float = 0.01  # of weights with two dimensions or more; norms and biases have none
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0  # largest norm of the whole gradient
    warmup_steps: int = 0  # updates until the learning rate has risen to lr
