"""Discriminator warm-up on teacher-student pairs, until it tells unseen pairs apart by a set margin.

A cold discriminator is fooled within a few alignment steps and drags the policy down with it, so the stage ends on what
the discriminator can do on held-out prompts, and fails loudly when it never gets there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from prism_fast.data.framing import SPANS, frame_warmup, side_texts
from prism_fast.data.grammar import split_tokens
from prism_fast.data.order import SampleOrder
from prism_fast.data.problems import holds_control_token
from prism_fast.data.readers import Samples
from prism_fast.data.samples import Pair, Task
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import Discriminator, save_discriminator
from prism_fast.models.processor import EncodedPrompt, Processor
from prism_fast.rollout.protocol import Completion, Sampling
from prism_fast.train.chunks import ChunkLog
from prism_fast.train.context import Run
from prism_fast.train.discriminator_update import GroupScores, SpanGroup, discriminate, loss_options
from prism_fast.train.layouts import prepare
from prism_fast.train.own_pairs import OwnPair
from prism_fast.train.resume import StageState
from prism_fast.train.seeds import derive_seed


class WarmupError(RuntimeError):
    """The discriminator did not reach the held-out margin."""


def pair_log(run: Run, tasks: Sequence[Task]) -> ChunkLog:
    """Where a run keeps what it has sampled so far, until the pairs are written."""
    made_with = {"seed": run.config.seed, "batch": _pair_batch(run), "prompts": len(tasks)}
    for key in ("pairs_per_prompt", "temperature", "max_new_tokens"):
        made_with[key] = getattr(run.config.warmup, key)
    return ChunkLog(run.folder / "data" / "pairs.chunks", made_with)


def _pair_batch(run: Run) -> int:
    """Prompts generated together."""
    return max(1, run.config.eval.batch // run.config.warmup.pairs_per_prompt)


def sample_pairs(run: Run, model, processor: Processor, tasks: Samples[Task], log: ChunkLog) -> list[OwnPair]:
    """Let the policy answer the alignment prompts: its valid responses, to be paired with the teacher's.

    ``log``: see :func:`pair_log`; a stop loses the batch that is being generated.

    Raises:
        WarmupError: no response was valid.
    """
    config, batch = run.config.warmup, _pair_batch(run)
    sampling = Sampling(config.pairs_per_prompt, config.temperature, config.max_new_tokens)
    engine = run.rollout_engine(model, processor)
    with run.progress.bar("pairs", -(-len(tasks) // batch), done=len(log.chunks)) as bar:
        for start in range(len(log.chunks) * batch, len(tasks), batch):
            run.stop.poll("sampling pairs")
            chunk = [tasks[i] for i in range(start, min(start + batch, len(tasks)))]
            prompts = [processor.encode_prompt(task.messages, task.images) for task in chunk]
            seeds = [derive_seed(run.config.seed, "pairs", start + k) for k in range(len(chunk))]
            groups = engine.generate(prompts, sampling, seeds, poll=lambda: run.stop.poll("sampling pairs"))
            log.append([[_student_texts(completion, processor) for completion in group] for group in groups])
            bar.advance(pairs=sum(texts is not None for done in log.chunks for group in done for texts in group))
    pairs, dropped = [], 0
    for index, group in enumerate(group for done in log.chunks for group in done):
        uid = tasks.without_images(index).uid
        pairs += [OwnPair(index, uid, k, **texts) for k, texts in enumerate(group) if texts is not None]
        dropped += group.count(None)
    run.metrics.write("warmup", 0, {"pairs/kept": len(pairs), "pairs/dropped": dropped})
    if not pairs:
        raise WarmupError("no sampled response had the caption-think-answer form; the policy needs (more) SFT first")
    return pairs


def _student_texts(completion: Completion, processor: Processor) -> dict[str, str] | None:
    """The student's side of a pair; None if the response is not valid or spells out a control token."""
    split = split_tokens(completion.token_ids, processor.tokenizer)
    if not split.valid or holds_control_token(split.text):
        return None
    return {"student_caption": split.caption, "student_cot": split.reasoning, "student_response": split.text}


def group_pairs(pairs: Sequence[Pair], processor: Processor, semantics: str, spans: Sequence[str]) -> list[SpanGroup]:
    """Pairs that share prompt and teacher become one group, in order of first appearance.

    Raises:
        ValueError: a pair lacks the texts of a span.
    """

    def framed(pair: Pair, side: Literal["teacher", "student"]) -> tuple[tuple[int, ...], ...]:
        texts = zip(spans, side_texts(pair, side, spans), strict=True)
        return tuple(frame_warmup(span, text, processor, semantics) for span, text in texts)

    prompts: dict[tuple, EncodedPrompt] = {}
    students: dict[tuple, list] = {}
    for i in range(len(pairs)):
        pair = pairs[i]
        encoded = processor.encode_prompt(pair.messages, pair.images)
        pixels = b"" if encoded.pixel_values is None else encoded.pixel_values.numpy().tobytes()
        key = (encoded.input_ids, pixels, framed(pair, "teacher"))
        prompts.setdefault(key, encoded)
        students.setdefault(key, []).append(framed(pair, "student"))
    return [SpanGroup(prompts[key], key[2], students[key]) for key in prompts]


def pair_margins(groups: Sequence[SpanGroup], scores: GroupScores, spans: Sequence[str]) -> dict[str, float]:
    """Mean margin (teacher - student) and accuracy over the pairs whose texts differ, per span."""
    numbers: dict[str, float] = {}
    group_of_row = torch.tensor([g for g, group in enumerate(groups) for _ in group.students])
    margin = scores.teacher[group_of_row] - scores.student  # [B, K]
    for k, span in enumerate(spans):
        differs = torch.tensor([p is not None and p[k] != g.teacher[k] for g in groups for p in g.students])
        if differs.any():
            values = margin[differs, k]
            numbers[f"margin_{span}"] = float(values.mean())
            numbers[f"acc_{span}"] = float((values > 0).float().mean())
            numbers[f"pairs_{span}"] = int(differs.sum())
    return numbers


class HeldOut:
    """The newest held-out margins; they decide when the stage ends."""

    def __init__(self, spans: Sequence[str]) -> None:
        self.spans = spans
        self.margins: dict[str, float] = {}

    def enough(self, target: float) -> bool:
        return all(self.margins.get(f"margin_{span}", -math.inf) >= target for span in self.spans)

    def state_dict(self) -> dict:
        return self.margins

    def load_state_dict(self, state: dict) -> None:
        self.margins = state


def warm_up(run: Run, discriminator: Discriminator, processor: Processor, pairs: Sequence[Pair]) -> Path:
    """Train the discriminator on pairs; returns the folder of its export.

    Raises:
        WarmupError: ``warmup.max_updates`` passed without the held-out margin, or too few pairs to hold some out.
    """
    config, spans = run.config.warmup, SPANS[run.config.align.discriminate]
    groups = group_pairs(pairs, processor, run.config.semantics, spans)
    held = max(1, round(config.heldout_share * len(groups)))
    if len(groups) - held < 1:
        raise WarmupError(f"the pairs have {len(groups)} prompt(s); at least 2 are needed to hold one out")
    shuffled = SampleOrder(len(groups), seed=derive_seed(run.config.seed, "warmup", "heldout")).next_indices(
        len(groups)
    )
    heldout, training = [groups[i] for i in shuffled[:held]], [groups[i] for i in shuffled[held:]]
    order = SampleOrder(len(training), seed=derive_seed(run.config.seed, "warmup", "order"))
    engine = LocalEngine(discriminator, config.optimizer)
    prepare(run.config.layout, discriminator.backbone)
    shared = {
        "pad_id": processor.pad_id,
        "device": run.device,
        "layout": run.config.layout,
        **loss_options(run.config, warmup=True),
    }
    # With the gradient checkpointing of the published warm-up its load-balancing loss has no gradient.
    aux_coef = 0.0 if run.config.semantics == "released" else config.aux_coef
    reached = HeldOut(spans)
    budgets = {"discriminator": config.tokens_per_micro_batch}
    state = StageState(run, "warmup", engines={"discriminator": engine}, budgets=budgets, order=order, extra=reached)
    budget = state.budgets["discriminator"]

    def poll() -> None:
        run.stop.poll("held-out pairs")

    with run.progress.bar("warmup", config.max_updates, done=state.step) as bar:
        while state.held is not None or not reached.enough(config.target_margin):
            if engine.updates == config.max_updates and state.held is None:
                shown = ", ".join(f"{k} {v:.3g}" for k, v in reached.margins.items()) or "never evaluated"
                raise WarmupError(
                    f"{config.max_updates} updates left the held-out margin under {config.target_margin} ({shown}): "
                    "raise warmup.max_updates or warmup.optimizer.lr, give more pairs, or lower warmup.target_margin"
                )
            numbers = state.held  # a run that was stopped while it scored held-out pairs goes on with them
            if numbers is None:
                state.begin_step()
                chunk = [training[i] for i in order.next_indices(config.prompts)]
                discriminator.train()
                scores, loss = discriminate(engine, chunk, budget, learn=True, aux_coef=aux_coef, **shared)
                numbers = {f"warmup/{key}": value for key, value in pair_margins(chunk, scores, spans).items()}
                update = engine.step()
                numbers |= {"warmup/loss": float(loss), "warmup/lr": update.lr, "warmup/grad_norm": update.grad_norm}
                numbers |= {f"warmup/{key}": value for key, value in scores.numbers().items()}
                numbers |= scores.passes.numbers("discriminator")
                numbers["warmup/token_budget"] = budget.change()
                state.hold(numbers)
            if engine.updates % config.eval_every == 0:
                discriminator.eval()
                scores, _ = discriminate(engine, heldout, budget, learn=False, poll=poll, **shared)
                reached.margins = pair_margins(heldout, scores, spans)
                numbers |= {f"warmup/heldout_{key}": value for key, value in reached.margins.items()}
            run.metrics.write("warmup", engine.updates, numbers)
            bar.advance(
                loss=numbers["warmup/loss"],
                **{f"heldout_{span}": reached.margins.get(f"margin_{span}") for span in spans},
            )
            state.end_step(last=reached.enough(config.target_margin))
    return run.export("discriminator-warmup", discriminator, partial(save_discriminator, discriminator, processor))
