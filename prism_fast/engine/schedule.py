"""Learning-rate schedules of a stage whose number of updates is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict

from prism_fast.engine.optimizer import OptimizerConfig

Schedule = Callable[[int], float]


class Planned(TypedDict):
    """Arguments of an engine."""

    config: OptimizerConfig
    schedule: Schedule | None


def planned(config: OptimizerConfig, updates: int) -> Planned:
    """``config`` for a stage of ``updates`` optimizer updates: its warm-up in updates, and the factor of the learning
    rate by update t (from 0) after the warm-up of w updates, where p = (t - w) / (updates - w):

    constant 1; linear 1 - p; cosine (1 + cos(pi p)) / 2. These are transformers' schedules. The factor reaches 0 one
    update after the last, so that no update is made in vain.

    Raises:
        ValueError: the warm-up is as long as a stage that decays, or longer.
    """
    rise = math.ceil(config.warmup_share * updates) if config.warmup_share else config.warmup_steps
    config = replace(config, warmup_steps=rise, warmup_share=0.0)
    if config.schedule == "constant":
        return {"config": config, "schedule": None}
    if rise >= updates:
        raise ValueError(
            f"the learning rate rises over {rise} updates and then falls ({config.schedule}), but the stage has "
            f"{updates}: lower optimizer.warmup_steps or set optimizer.schedule=constant"
        )

    def factor(update: int) -> float:
        progress = min(1.0, max(0.0, (update - rise) / (updates - rise)))
        return 1.0 - progress if config.schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2

    return {"config": config, "schedule": factor}
