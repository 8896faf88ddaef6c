"""A column of the step, and its results to be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from prism_fast.config import OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update

from .work import Models, Work

PHASES = ("score", "discriminator", "policy")


class Outcome(NamedTuple):
    """Of one step: scores before the update (``student`` [n, 2], ``teacher`` [2], float32, CPU), both losses, and the
    largest difference in nats between a response token's log-prob and its log-prob when sampled."""

    student: Tensor
    teacher: Tensor
    discriminator_loss: float
    policy_loss: float
    gap: float


class Engine(LocalEngine):
    """The trainer's engine; ``gradient``: a copy of the gradients of the last update with ``keep`` set."""

    keep = False
    gradient: dict[str, Tensor]

    def step(self) -> Update:
        if self.keep:
            named = self.masters.items()
            self.gradient = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return super().step()


class Column(ABC):
    """One alignment step in three phases, each to be called in the order of ``PHASES``."""

    def __init__(self, name: str, models: Models, work: Work) -> None:
        self.name, self.work = name, work
        self.policy, self.discriminator = models
        self.device = next(self.policy.parameters()).device
        self.policy_engine, self.discriminator_engine = (Engine(model, OptimizerConfig()) for model in models)

    @abstractmethod
    def score(self) -> None: ...

    @abstractmethod
    def update_discriminator(self) -> None: ...

    @abstractmethod
    def update_policy(self) -> None: ...

    @abstractmethod
    def outcome(self) -> Outcome: ...

    def phases(self):
        """(name, call) in order."""
        return zip(PHASES, (self.score, self.update_discriminator, self.update_policy), strict=True)

    def engines(self) -> dict[str, Engine]:
        return {"discriminator": self.discriminator_engine, "policy": self.policy_engine}

    def models(self) -> tuple[tuple[nn.Module, nn.Module | None], ...]:
        """Backbone and output matrix of both."""
        return (self.discriminator.backbone, None), (self.policy.model, self.policy.lm_head)
