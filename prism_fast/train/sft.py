"""Supervised fine-tuning, run to its validation plateau, and the control that continues it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from prism_fast.config import SftConfig
from prism_fast.data.order import SampleOrder
from prism_fast.data.samples import Demonstration
from prism_fast.models.forward import TokenBatch, collate
from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.train.context import Run
from prism_fast.train.engine import LocalEngine
from prism_fast.train.microbatch import by_tokens
from prism_fast.train.policy_update import token_logprobs
from prism_fast.train.resume import StageState
from prism_fast.train.seeds import derive_seed


def _batches(demos: Sequence[Demonstration], processor: Processor, model, budget: int) -> tuple[list[TokenBatch], int]:
    """Micro-batches of demonstrations, and the number of response tokens in all of them (end token included)."""
    prompts = [processor.encode_prompt(demo.messages, demo.images) for demo in demos]
    responses = [(*processor.encode_plain(demo.response), processor.eos_id) for demo in demos]
    lengths = [len(p.input_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
    batches = [
        collate(
            [prompts[i] for i in part],
            range(len(part)),
            [responses[i] for i in part],
            model_config=model.config,
            pad_id=processor.pad_id,
        )
        for part in by_tokens(lengths, budget)
    ]
    return batches, sum(len(r) for r in responses)


def _validation_loss(model, batches: list[TokenBatch], tokens: int, device: torch.device) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(float(-token_logprobs(model, b.to(device), temperature=1.0)[0].sum()) for b in batches)
    return total / tokens


def _update(engine: LocalEngine, demos: Sequence[Demonstration], processor: Processor, run: Run) -> dict[str, float]:
    engine.model.train()
    batches, tokens = _batches(demos, processor, engine.model, run.config.sft.tokens_per_micro_batch)
    loss_sum = 0.0
    for batch in batches:
        logp, _ = token_logprobs(engine.model, batch.to(run.device), temperature=1.0)
        loss = -logp.sum() / tokens
        engine.backward(loss)
        loss_sum += float(loss.detach())
    return {"sft/loss": loss_sum, "sft/lr": engine.lr(), "sft/grad_norm": engine.step(), "sft/tokens": tokens}


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
    val_batches, val_tokens = _batches(
        [val[i] for i in range(len(val))], processor, model, config.tokens_per_micro_batch
    )
    state = StageState(run, "sft", engines={"policy": engine}, order=order, extra=decay)
    with run.progress.bar("sft", config.max_updates, done=state.step) as bar:
        while engine.updates < decay.end:
            state.begin_step()
            numbers = _update(engine, [demos[i] for i in order.next_indices(config.batch)], processor, run)
            if engine.updates % config.eval_every == 0 or engine.updates == decay.end:
                numbers["sft/val_loss"] = _validation_loss(model, val_batches, val_tokens, run.device)
                decay.observe(engine.updates, numbers["sft/val_loss"])
            run.metrics.write("sft", engine.updates, numbers)
            bar.advance(loss=numbers["sft/loss"], val_loss=numbers.get("sft/val_loss"), lr=numbers["sft/lr"])
            state.end_step(last=engine.updates >= decay.end)
    folder = run.export_folder("sft")
    save_policy(model, processor, folder)
    return folder


def continue_sft(run: Run, model, processor: Processor, demos: Sequence[Demonstration], updates: int) -> Path:
    """The control: as many further SFT updates on the same mixture as alignment and RLVR take, decayed to zero."""
    config = run.config.sft
    engine = LocalEngine(
        model, config.optimizer, schedule=lambda update: config.continued_lr_scale * (1.0 - update / updates)
    )
    order = SampleOrder(len(demos), seed=derive_seed(run.config.seed, "sft_continued", "order"))
    state = StageState(run, "sft_continued", engines={"policy": engine}, order=order)
    with run.progress.bar("sft_continued", updates, done=state.step) as bar:
        while state.step < updates:
            state.begin_step()
            indices = order.next_indices(config.batch)
            numbers = _update(engine, [demos[i] for i in indices], processor, run)
            run.metrics.write("sft_continued", engine.updates, numbers)
            bar.advance(loss=numbers["sft/loss"], lr=numbers["sft/lr"])
            state.end_step(last=state.step == updates)
    folder = run.export_folder("sft_continued")
    save_policy(model, processor, folder)
    return folder
