"""One update, or one scoring, by a trainer that is made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from prism_fast.engine.local import LocalEngine
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.models.packing import PromptGroup
from prism_fast.models.token_budget import TokenBudget
from prism_fast.ops import PolicyLossOptions
from prism_fast.train.batching import Batching
from prism_fast.train.discriminator_trainer import DiscriminatorLoss, DiscriminatorTrainer
from prism_fast.train.layouts import Layout
from prism_fast.train.passes import Passes
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.sft import SftTrainer

SPANS = {1: ("response",), 2: ("caption", "reasoning")}


def update_policy(
    engine: LocalEngine,
    batch: PolicyBatch,
    options: PolicyLossOptions,
    *,
    budget: TokenBudget,
    layout: Layout,
    pad_id: int,
    **settings: Any,
) -> dict[str, float]:
    """The metrics of one update; ``settings`` of ``PolicyTrainer``."""
    trainer = PolicyTrainer(engine, Batching(layout, budget, pad_id), options, **settings)
    return (trainer.accumulate(batch) | trainer.step()).read()


def update_sft(
    engine: LocalEngine, groups: Sequence[PromptGroup], budget: TokenBudget, *, layout: Layout, pad_id: int
) -> dict[str, float]:
    """The metrics of one update on demonstrations."""
    trainer = SftTrainer(engine, Batching(layout, budget, pad_id))
    return (trainer.accumulate(groups) | trainer.step()).read()


def passes_of(metrics: dict[str, float], model: str) -> Passes:
    """The counts of passes through ``model``: "policy" or "discriminator"."""
    return Passes(*(metrics[f"passes/{model}_{kind}"] for kind in Passes.__dataclass_fields__))


class Scored(NamedTuple):
    """Scores of the students [B, K] and of the teacher [G, K], and the metrics (prefix ``disc/``)."""

    student: Tensor
    teacher: Tensor
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        return self.metrics["disc/loss"]

    @property
    def tokens(self) -> int:
        return self.metrics["disc/tokens"]

    @property
    def repeated(self) -> int:
        return self.metrics["disc/tokens_repeated"]

    @property
    def packing_error(self) -> float | None:
        return self.metrics.get("disc/packing_error")

    @property
    def passes(self) -> Passes:
        return passes_of(self.metrics, "discriminator")

    @property
    def experts(self) -> dict[str, float]:
        """What ``expert_shares`` found."""
        return {name[5:]: value for name, value in self.metrics.items() if name.startswith("disc/expert")}


def discriminator_trainer(
    engine: LocalEngine,
    columns: int,
    *,
    budget: TokenBudget,
    layout: Layout,
    pad_id: int,
    positions: str = "mrope",
    **loss: Any,
) -> DiscriminatorTrainer:
    """Of groups with ``columns`` scores; ``loss``: fields of ``DiscriminatorLoss``."""
    batching = Batching(layout, budget, pad_id, positions=positions, whole_groups=True)
    return DiscriminatorTrainer(engine, batching, DiscriminatorLoss(**loss), spans=SPANS[columns], prefix="disc/")


def discriminate(
    engine: LocalEngine, groups: Sequence[ScoredGroup], budget: TokenBudget, *, learn: bool, **settings: Any
) -> Scored:
    """Scores of ``groups``; with ``learn`` their gradient is left in the engine, not used up."""
    trainer = discriminator_trainer(engine, len(groups[0].teacher), budget=budget, **settings)
    scores = trainer.score_and_accumulate(groups) if learn else trainer.score(groups, prefix="disc/")
    return Scored(scores.student, scores.teacher, scores.metrics.read())


def score_and_learn(model: nn.Module, groups: Sequence[ScoredGroup], *, tokens: int, **settings: Any) -> Scored:
    """Scores of ``groups`` in micro-batches of ``tokens`` tokens; the gradient is left at the parameters of ``model``,
    from zero."""
    model.zero_grad(set_to_none=True)
    engine = LocalEngine(model, OptimizerConfig())
    engine.packing_checked = True

    def fail(text: str) -> None:
        raise AssertionError(text)

    return discriminate(engine, groups, TokenBudget(tokens, notify=fail), learn=True, **settings)
