"""Supervised fine-tuning, run to its validation plateau, and the control that continues it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prism_fast.config import SftConfig
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Demonstration
from prism_fast.engine.local import LocalEngine
from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.layouts import Forward, Layout, Step, lay_out, longest_item, prepare
from prism_fast.train.microbatch import TokenBudget
from prism_fast.train.passes import Passes, counted_passes
from prism_fast.train.policy_update import response_states
from prism_fast.train.resume import StageState
from prism_fast.train.seeds import derive_seed
from prism_fast.train.self_check import self_check


@dataclass(frozen=True)
class EncodedDemos:
    """Demonstrations as token ids: groups of one response each, for they seldom share a prompt. Responses end with the
    end token."""

    groups: list[PromptGroup]
    layout: Layout
    pad_id: int

    @classmethod
    def of(cls, demos: Sequence[Demonstration], processor: Processor, layout: Layout) -> EncodedDemos:
        def response(demo: Demonstration) -> tuple[int, ...]:
            return (*processor.encode_plain(demo.response), processor.eos_id)

        groups = [PromptGroup(processor.encode_prompt(d.messages, d.images), [response(d)]) for d in demos]
        return cls(groups, layout, processor.pad_id)

    @property
    def longest(self) -> int:
        """Tokens of the longest demonstration."""
        return longest_item(self.layout, self.groups)

    @property
    def response_tokens(self) -> int:
        return sum(len(response) for group in self.groups for response in group.branches)

    def cut(self, tokens: int, model) -> Step:
        """Forwards of at most ``tokens`` tokens (padding counts)."""
        return lay_out(self.layout, model.model, self.groups, tokens, pad_id=self.pad_id)


def _nats(model, computed: Forward, **reduced) -> Tensor:
    """Cross entropy of the continuation tokens of a forward, 0-d, by the model's :class:`LogProbHead`: no other row
    reaches it, and its gradient is formed with it."""
    hidden = computed.hidden.index_select(0, computed.predict.index)  # [N, H]
    return model.lm_head.cross_entropy(hidden, computed.predict.target, **reduced)


def _validation_loss(run: Run, model, demos: EncodedDemos, budget: TokenBudget) -> float:
    """Nats per response token, response tokens of all demonstrations counting the same."""
    model.eval()

    def evaluate(tokens: int) -> float:
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        step = demos.cut(tokens, model)
        for part in step.parts:
            run.stop.poll("SFT validation")
            with torch.no_grad():
                total += _nats(model, step.forward(part), reduction="sum")
            step.finish(part, None)
        return float(total)

    total = budget.run(evaluate, discard=lambda: None, longest=demos.longest)
    return total / demos.response_tokens


def _update(engine: LocalEngine, encoded: EncodedDemos, budget: TokenBudget) -> dict[str, float | int | None]:
    """One optimizer step on the mean negative log-prob of the demonstrations' response tokens."""
    engine.module.train()
    tokens = encoded.response_tokens

    def accumulate(limit: int) -> tuple[float, Passes]:
        losses = []
        step = encoded.cut(limit, engine.module)
        with counted_passes(engine.module.model) as passes:
            for part in step.parts:
                loss = _nats(engine.module, step.forward(part), denominator=tokens)
                engine.backward(loss)
                step.finish(part, engine.backward)
                losses.append(loss.detach().double())
        return float(torch.stack(losses).sum()), passes  # the step's one look at its losses

    checked = {"budget": budget.tokens, "pad_id": encoded.pad_id}
    error = self_check(engine, encoded.layout, engine.module.model, encoded.groups, response_states, **checked)
    loss, passes = budget.run(accumulate, discard=engine.discard, longest=encoded.longest)
    return {
        "sft/loss": loss,
        "sft/lr": engine.lr(),
        "sft/grad_norm": engine.step().grad_norm,
        "sft/tokens": tokens,
        "sft/token_budget": budget.change(),
        "sft/packing_error": error,
        **passes.numbers("policy"),
    }


class PlateauDecay:
    """Learning-rate scale: 1 until the validation loss stops improving, then a linear decay to 0, then the end."""

    def __init__(self, config: SftConfig):
        self.config = config
        self.best = math.inf
        self.stale = 0
        self.decay_start: int | None = None
        self.end = config.max_updates

    def state_dict(self) -> dict:
        return {"best": self.best, "stale": self.stale, "decay_start": self.decay_start, "end": self.end}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.stale, self.decay_start, self.end = (state[k] for k in ("best", "stale", "decay_start", "end"))

    def observe(self, updates: int, validation_loss: float) -> None:
        """Take a validation loss; begins the decay after ``patience`` evaluations without improvement."""
        if self.decay_start is not None:
            return
        improved = validation_loss < self.best * (1 - self.config.min_improvement)
        self.best = min(self.best, validation_loss)
        self.stale = 0 if improved else self.stale + 1
        if self.stale >= self.config.patience or updates >= self.decay_latest():
            self.begin_decay(updates)

    def decay_latest(self) -> int:
        """The update at which the decay must begin so that it ends by ``max_updates``."""
        return int(self.config.max_updates / (1 + self.config.decay_share))

    def begin_decay(self, updates: int) -> None:
        self.decay_start = updates
        self.end = min(self.config.max_updates, updates + max(1, round(self.config.decay_share * updates)))

    def __call__(self, update: int) -> float:
        if self.decay_start is None:
            return 1.0
        return max(0.0, (self.end - update) / max(1, self.end - self.decay_start))


def train_sft(
    run: Run, model, processor: Processor, demos: Sequence[Demonstration], val: Sequence[Demonstration]
) -> Path:
    """SFT to the plateau of the validation loss; returns the folder of the exported policy."""
    config = run.config.sft
    decay = PlateauDecay(config)
    engine = LocalEngine(model, config.optimizer, schedule=decay)
    order = SampleOrder(len(demos), seed=derive_seed(run.config.seed, "sft", "order"))
    layout = run.config.layout
    prepare(layout, model)
    validation = EncodedDemos.of([val[i] for i in range(len(val))], processor, layout)
    budgets = {"policy": config.tokens_per_micro_batch}
    state = StageState(run, "sft", engines={"policy": engine}, budgets=budgets, order=order, extra=decay)
    budget = state.budgets["policy"]
    with run.progress.bar("sft", config.max_updates, done=state.step) as bar:
        while engine.updates < decay.end or state.held is not None:
            numbers = state.held  # a run that was stopped during a validation goes on with that validation
            if numbers is None:
                state.begin_step()
                chunk = [demos[i] for i in order.next_indices(config.batch)]
                numbers = _update(engine, EncodedDemos.of(chunk, processor, layout), budget)
                state.hold(numbers)
            if engine.updates % config.eval_every == 0 or engine.updates == decay.end:
                numbers["sft/val_loss"] = _validation_loss(run, model, validation, budget)
                decay.observe(engine.updates, numbers["sft/val_loss"])
            run.metrics.write("sft", engine.updates, numbers)
            bar.advance(loss=numbers["sft/loss"], val_loss=numbers.get("sft/val_loss"), lr=numbers["sft/lr"])
            state.end_step(last=engine.updates >= decay.end)
    return run.export("sft", model, partial(save_policy, model, processor))


def continue_sft(run: Run, model, processor: Processor, demos: Sequence[Demonstration], updates: int) -> Path:
    """The control: as many further SFT updates on the same mixture as alignment and RLVR take, decayed to zero."""
    config = run.config.sft
    engine = LocalEngine(
        model, config.optimizer, schedule=lambda update: config.continued_lr_scale * (1.0 - update / updates)
    )
    order = SampleOrder(len(demos), seed=derive_seed(run.config.seed, "sft_continued", "order"))
    budgets = {"policy": config.tokens_per_micro_batch}
    prepare(run.config.layout, model)
    state = StageState(run, "sft_continued", engines={"policy": engine}, budgets=budgets, order=order)
    with run.progress.bar("sft_continued", updates, done=state.step) as bar:
        while state.step < updates:
            state.begin_step()
            chunk = [demos[i] for i in order.next_indices(config.batch)]
            numbers = _update(engine, EncodedDemos.of(chunk, processor, run.config.layout), state.budgets["policy"])
            run.metrics.write("sft_continued", engine.updates, numbers)
            bar.advance(loss=numbers["sft/loss"], lr=numbers["sft/lr"])
            state.end_step(last=state.step == updates)
    return run.export("sft_continued", model, partial(save_policy, model, processor))
