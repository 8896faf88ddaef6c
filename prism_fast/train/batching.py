"""How a trainer cuts its steps into micro-batches; fixed when the trainer is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedConfig

from prism_fast.engine.protocol import Engine
from prism_fast.models.packing import PromptGroup
from prism_fast.models.token_budget import StepTooLargeError, TokenBudget, out_of_memory
from prism_fast.track.flops import forward_flops
from prism_fast.track.metrics import Metrics
from prism_fast.train.layouts import BatchPlan, Layout, longest_item, plan_batches

T = TypeVar("T")


@dataclass(frozen=True)
class Batching:
    """``budget``: tokens of a micro-batch. ``positions``: see ``models.forward.collate``. ``whole_groups``: a group's
    continuations stay in one micro-batch of the padded layout whatever their size (packed rows: see
    ``BatchPlan.bound``)."""

    layout: Layout
    budget: TokenBudget
    pad_id: int
    positions: str = "mrope"
    whole_groups: bool = False

    def plan(
        self, backbone: nn.Module, groups: Sequence[PromptGroup], tokens: int, *, lockstep: bool = False
    ) -> BatchPlan:
        """``groups`` in micro-batches of at most ``tokens`` tokens. ``lockstep``: of the engine."""
        return plan_batches(
            self.layout,
            backbone,
            groups,
            tokens,
            pad_id=self.pad_id,
            positions=self.positions,
            whole_groups=self.whole_groups,
            lockstep=lockstep,
        )

    def work(self, config: PreTrainedConfig, groups: Sequence[PromptGroup], *, vocabulary: bool) -> Metrics:
        """Metrics of one pass over ``groups``: ``perf/tokens``, each prompt once and no padding, and
        ``perf/forward_flops``, see ``track.flops.forward_flops``."""
        metrics = Metrics()
        for group in groups:
            lengths = [len(branch) for branch in group.branches if branch is not None]
            metrics.sum("perf/tokens", len(group.prompt.input_ids) + sum(lengths) if lengths else 0)
        metrics.sum("perf/forward_flops", forward_flops(config, groups, vocabulary=vocabulary))
        return metrics

    def budget_metrics(self, prefix: str) -> Metrics:
        """``<prefix>token_budget`` if memory ran out since the last call."""
        metrics = Metrics()
        if (tokens := self.budget.change()) is not None:
            metrics.last(f"{prefix}token_budget", tokens)
        return metrics

    def run(self, attempt: Callable[[int], T], groups: Sequence[PromptGroup], engine: Engine) -> T:
        """Joint. Call ``attempt(tokens)`` within the budget; see ``TokenBudget.run``.

        Raises:
            StepTooLargeError: the longest item does not fit, or anything where the engine goes in lockstep: other ranks
                are in the middle of a pass and cannot begin anew.
        """
        if engine.lockstep:
            try:
                return attempt(self.budget.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise StepTooLargeError(
                    f"out of memory with micro-batches of {self.budget.tokens} tokens ({error}). Ranks that gather "
                    "weights in every pass cannot repeat a step: lower tokens_per_micro_batch of the stage, or use "
                    "engine.stage=1"
                ) from error
        longest = longest_item(self.layout, groups, whole_groups=self.whole_groups)
        return self.budget.run(attempt, discard=engine.discard, longest=longest, agree=engine.agree)


def missing_passes(engine: Engine, plan: BatchPlan) -> int:
    """Joint, and called before the first pass, where the engine goes in lockstep: how many passes more another rank
    makes, which this one must match by passes of weight 0. Otherwise 0."""
    passes = len(plan.micro_batches)
    return int(engine.max([passes])[0]) - passes if engine.lockstep else 0


def update_weights(engine: Engine, prefix: str) -> Metrics:
    """``engine.step()`` and its metrics ``<prefix>grad_norm`` and ``<prefix>lr``. Raises NonFiniteError as it does."""
    update, metrics = engine.step(), Metrics()
    metrics.mean(f"{prefix}grad_norm", update.grad_norm)
    metrics.last(f"{prefix}lr", update.lr)
    return metrics
