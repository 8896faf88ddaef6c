"""Supervised fine-tuning to its validation plateau or for a number of updates, and the control that continues it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from prism_fast.config import ConfigError, SftConfig
from prism_fast.data.order import MixedOrder, SampleOrder, order_of
from prism_fast.data.samples import Demonstration, Samples
from prism_fast.engine.protocol import Engine
from prism_fast.engine.schedule import planned
from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.track.metrics import Metrics
from prism_fast.train.batching import Batching, missing_passes, update_weights
from prism_fast.train.context import Run
from prism_fast.train.layouts import BatchPlan, MicroBatch, use_layout
from prism_fast.train.length import stage_length
from prism_fast.train.passes import counted_passes
from prism_fast.train.policy_trainer import response_states
from prism_fast.train.seeds import derive_seed
from prism_fast.train.self_check import check_before_sharding, self_check
from prism_fast.train.state import StageState


def encode(
    demos: Sequence[Demonstration], processor: Processor, turns: Literal["last", "all"] = "last"
) -> list[PromptGroup]:
    """Each demonstration as a group of one response, which ends with the end token; prompts are seldom shared. ``all``:
    one group for each assistant turn, behind the turns before it."""
    learned = demos if turns == "last" else [part for demo in demos for part in by_turn(demo)]
    return [
        PromptGroup(
            processor.encode_prompt(demo.messages, demo.images),
            [(*processor.encode_plain(demo.response), processor.eos_id)],
        )
        for demo in learned
    ]


def by_turn(demo: Demonstration) -> Iterator[Demonstration]:
    """A demonstration for each assistant turn of ``demo``, in their order, with the images of the turns before it."""
    images = 0
    for place, message in enumerate(demo.messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "assistant":
            text = "".join(part.get("text", "") for part in parts)
            yield Demonstration(f"{demo.uid}#{place}", demo.messages[:place], text, demo.images[:images])
        images += sum(part["type"] == "image" for part in parts)
    yield demo


def response_tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(len(response) for group in groups for response in group.branches)


class SftTrainer:
    """`accumulate` adds the gradient of demonstrations, `step` updates the weights, `validate` measures."""

    def __init__(self, engine: Engine, batching: Batching) -> None:
        self.engine, self.batching = engine, batching
        self.policy = engine.module

    def accumulate(self, groups: Sequence[PromptGroup]) -> Metrics:
        """Add the gradient of the mean negative log-prob of the response tokens.

        Raises:
            StepTooLargeError: the longest demonstration alone does not fit into memory.
        """
        self.policy.train()
        backbone, tokens = self.policy.model, response_tokens(groups)
        (denominator,) = self.engine.sum([tokens])

        def attempt(limit: int) -> Metrics:
            metrics = Metrics()
            with counted_passes(backbone) as passes:
                plan = self.batching.plan(backbone, groups, limit, lockstep=self.engine.lockstep)
                missing = missing_passes(self.engine, plan)
                for batch in plan.micro_batches:
                    loss = self._nats(plan, batch, denominator=denominator)
                    self.engine.backward(loss)
                    plan.finish(batch, self.engine.backward)
                    metrics.mean("sft/loss", loss.detach(), 0)
                for _ in range(missing):
                    self.engine.backward(0 * self._nats(plan, plan.micro_batches[-1], denominator=denominator))
            return metrics | passes.metrics("policy")

        packing_error = self_check(self.engine, self.batching, backbone, groups, response_states)
        metrics = self.batching.run(attempt, groups, self.engine)
        metrics.mean("sft/loss", 0.0, 1 / self.engine.ranks)  # the micro-batches have added their totals with count 0
        metrics |= self.batching.work(self.policy.config, groups, vocabulary=True)
        metrics.sum("sft/tokens", tokens)
        if packing_error is not None:
            metrics.last("sft/packing_error", packing_error)
        return metrics

    def step(self) -> Metrics:
        """Update the weights.

        Raises:
            NonFiniteError: the loss or the gradient norm is NaN or infinite; nothing was updated.
        """
        return update_weights(self.engine, "sft/") | self.batching.budget_metrics("sft/")

    @torch.no_grad()
    def validate(self, groups: Sequence[PromptGroup], *, poll: Callable[[], None]) -> float:
        """Joint. Nats per response token, over all tokens of all ranks alike. ``poll`` is called before each
        micro-batch and may raise to stop."""
        self.policy.eval()

        def attempt(limit: int) -> float:
            total = torch.zeros((), dtype=torch.float64, device=self.policy.device)
            plan = self.batching.plan(self.policy.model, groups, limit, lockstep=self.engine.lockstep)
            missing = missing_passes(self.engine, plan)
            for batch in plan.micro_batches:
                poll()
                total += self._nats(plan, batch, reduction="sum")
                plan.finish(batch, None)
            for _ in range(missing):
                self._nats(plan, plan.micro_batches[-1], reduction="sum")
            return float(total)

        nats, tokens = self.engine.sum([self.batching.run(attempt, groups, self.engine), response_tokens(groups)])
        return nats / tokens

    def _nats(self, plan: BatchPlan, batch: MicroBatch, **reduced: float | str) -> Tensor:
        """Cross entropy of a micro-batch's response tokens, 0-d; no other row goes through the output head."""

        def loss() -> Tensor:
            forward = plan.forward(batch)
            hidden = forward.hidden.index_select(0, forward.predict.index)  # [N, H]
            return self.policy.lm_head.cross_entropy(hidden, forward.predict.target, **reduced)

        return self.engine.run(loss)


class PlateauDecay:
    """Learning-rate scale: 1 until the validation loss stops improving, then a linear decay to 0, then the end.

    Without a plateau the decay begins where it still ends at ``max_updates`` with its whole length, whenever the loss
    is evaluated.
    """

    def __init__(self, config: SftConfig):
        self.config = config
        self.best = math.inf
        self.stale = 0
        self.start = int(config.max_updates / (1 + config.decay_share))
        self.end = config.max_updates

    def state_dict(self) -> dict:
        return {"best": self.best, "stale": self.stale, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.stale, self.start, self.end = (state[k] for k in ("best", "stale", "start", "end"))

    def observe(self, updates: int, validation_loss: float) -> None:
        """Record a validation loss; the decay begins after ``patience`` evaluations without improvement."""
        if updates >= self.start:
            return
        improved = validation_loss < self.best * (1 - self.config.min_improvement)
        self.best = min(self.best, validation_loss)
        self.stale = 0 if improved else self.stale + 1
        if self.stale >= self.config.patience:
            self.start = updates
            self.end = updates + max(1, round(self.config.decay_share * updates))

    def __call__(self, update: int) -> float:
        return 1.0 if update <= self.start else max(0.0, (self.end - update) / (self.end - self.start))


def train_sft(
    run: Run, model, processor: Processor, demos: Samples[Demonstration], val: Sequence[Demonstration]
) -> Path:
    """SFT to the plateau of the validation loss, or for the updates that ``sft.ends=updates`` asks for; returns the
    folder of the exported policy."""
    config = run.config.sft
    updates = stage_length(config.max_updates, config.epochs, len(demos), config.batch)
    decay = PlateauDecay(config) if config.ends == "plateau" else None
    if len(val) < run.world.size:
        raise ConfigError(
            f"the {len(val)} demonstrations for validation are fewer than the {run.world.size} ranks: give more"
        )
    _check_packing(run, model, demos, processor)
    if decay is not None:
        engine = run.engine(model, config.optimizer, schedule=decay)
    else:
        engine = run.engine(model, **planned(config.optimizer, updates))
    order = order_of(demos, derive_seed(run.config.seed, "sft", "order"))
    validation = encode([val[i] for i in run.world.share(range(len(val)))], processor, config.turns)
    state, trainer = _prepare(run, "sft", engine, order, processor, decay)
    shown = {"loss": "sft/loss", "val_loss": "sft/val_loss", "lr": "sft/lr"}
    for step in state.steps(updates, done=lambda: decay is not None and state.step >= decay.end, shown=shown):
        metrics = state.held  # set where a stop interrupted the validation of this step
        if metrics is None:
            mine = run.world.share(order.next_indices(config.batch))
            groups = encode([demos[i] for i in mine], processor, config.turns)
            with state.timer.part("update", learns=True):
                metrics = trainer.accumulate(groups) | trainer.step()
            state.hold(metrics)
        if step % config.eval_every == 0 or step == (updates if decay is None else decay.end):
            with state.timer.part("validation"):
                loss = trainer.validate(validation, poll=lambda: run.stop.poll("SFT validation"))
            metrics.last("sft/val_loss", loss)
            if decay is not None:
                decay.observe(step, loss)
        state.end_step(metrics)
    return run.export("sft", engine, partial(save_policy, model, processor))


def continue_sft(run: Run, model, processor: Processor, demos: Samples[Demonstration], updates: int) -> Path:
    """The control: as many more SFT updates on the same mixture as alignment and RLVR take, decayed to zero."""
    config = run.config.sft
    _check_packing(run, model, demos, processor)
    optimizer = planned(replace(config.optimizer, schedule="constant"), updates)["config"]  # its warm-up alone
    engine = run.engine(model, optimizer, schedule=lambda update: config.continued_lr_scale * (1.0 - update / updates))
    order = order_of(demos, derive_seed(run.config.seed, "sft_continued", "order"))
    state, trainer = _prepare(run, "sft_continued", engine, order, processor)
    for _ in state.steps(updates, shown={"loss": "sft/loss", "lr": "sft/lr"}):
        mine = run.world.share(order.next_indices(config.batch))
        groups = encode([demos[i] for i in mine], processor, config.turns)
        with state.timer.part("update", learns=True):
            metrics = trainer.accumulate(groups) | trainer.step()
        state.end_step(metrics)
    return run.export("sft_continued", engine, partial(save_policy, model, processor))


def _check_packing(run: Run, model, demos: Samples[Demonstration], processor: Processor) -> None:
    budget = run.config.sft.tokens_per_micro_batch
    check_before_sharding(run.config, model.model, demos, processor, response_states, budget=budget)


def _prepare(
    run: Run,
    stage: str,
    engine: Engine,
    order: SampleOrder | MixedOrder,
    processor: Processor,
    decay: PlateauDecay | None = None,
) -> tuple[StageState, SftTrainer]:
    use_layout(run.config.layout, engine.module)
    budgets = {"policy": run.config.sft.tokens_per_micro_batch}
    state = StageState(run, stage, engines={"policy": engine}, budgets=budgets, order=order, extra=decay)
    return state, SftTrainer(engine, Batching(run.config.layout, state.budgets["policy"], processor.pad_id))
