"""Settings of ``engine.*``: who owns a model that learns. No torch here: configurations are read without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

STAGES = (1, 2, 3)


@dataclass
class EngineConfig:
    # local: one process. deepspeed: the ranks that torchrun, the deepspeed launcher or srun started, or this process.
    kind: Literal["local", "deepspeed"] = "local"
    # ZeRO. 1 and 2 are the same here: moments and masters are sharded. 3 shards weights and gradients as well: the
    # least memory, with a gather in every pass.
    stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own configuration, for engine.kind=deepspeed
    # Seconds that a rank waits for the others, whose responses may be longer; then the run ends. A rank that died is
    # found within a minute, whatever this is.
    patience_s: float = 1800.0

    @property
    def shards_weights(self) -> bool:
        return self.kind == "deepspeed" and self.stage == 3

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"engine.stage must be one of {', '.join(map(str, STAGES))}, got {self.stage!r}")
        if self.deepspeed and self.kind != "deepspeed":
            raise ValueError("engine.deepspeed is for engine.kind=deepspeed, got engine.kind=local: leave it out")
