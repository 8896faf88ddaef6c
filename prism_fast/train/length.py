"""How many steps a stage has."""

from __future__ import annotations

import math


def stage_length(steps: int, epochs: float | None, samples: int, per_step: int) -> int:
    """``steps``, or where ``epochs`` is given the steps that take every one of ``samples`` so many times, ``per_step``
    in each; rounded up, so the last step may take some once more."""
    return steps if epochs is None else max(1, math.ceil(epochs * samples / per_step))
