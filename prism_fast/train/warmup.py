"""Discriminator warm-up on teacher-student pairs, until it tells unseen pairs apart by a set margin.

A cold discriminator is fooled within a few alignment steps and drags the policy down with it. The stage therefore ends
when the margin on held-out prompts reaches its target, and fails if it never does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.data.framing import SPANS, frame_warmup, side_texts
from prism_fast.data.grammar import split_tokens
from prism_fast.data.order import SampleOrder
from prism_fast.data.problems import holds_control_token
from prism_fast.data.samples import Pair, Samples, Task
from prism_fast.engine.schedule import planned
from prism_fast.engine.world import World
from prism_fast.models.discriminator import Discriminator, save_discriminator
from prism_fast.models.processor import Processor, Prompt
from prism_fast.rollout.protocol import Completion, Sampling
from prism_fast.track.metrics import Metrics
from prism_fast.train.batching import Batching
from prism_fast.train.chunks import ChunkLog
from prism_fast.train.context import Run
from prism_fast.train.discriminator_trainer import DiscriminatorTrainer, discriminator_loss_of, end_states
from prism_fast.train.layouts import use_layout
from prism_fast.train.own_pairs import OwnPair
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.seeds import derive_seed
from prism_fast.train.self_check import check_before_sharding
from prism_fast.train.state import StageState
from prism_fast.train.turns import awake


class WarmupError(RuntimeError):
    """The discriminator did not reach the held-out margin."""


def pair_log(run: Run, tasks: Sequence[Task]) -> ChunkLog:
    """The log of responses sampled so far; needed until the pairs are written."""
    made_with = {"format": 2, "seed": run.config.seed, "batch": _pair_batch(run), "prompts": len(tasks)}
    for key in ("pairs_per_prompt", "temperature", "max_new_tokens"):
        made_with[key] = getattr(run.config.warmup, key)
    return ChunkLog(run.folder / "data" / "pairs.chunks", made_with, run.world)


def _pair_batch(run: Run) -> int:
    """Prompts generated together."""
    return max(1, run.config.eval.batch // run.config.warmup.pairs_per_prompt)


def sample_pairs(run: Run, model, processor: Processor, tasks: Samples[Task], log: ChunkLog) -> list[OwnPair]:
    """Sample responses to the alignment prompts; the valid ones are to be paired with the teacher's.

    ``log``: see :func:`pair_log`; a stop loses only the batch that is being generated.

    Raises:
        WarmupError: no response was valid; it tells cut responses from malformed ones.
    """
    config, batch = run.config.warmup, _pair_batch(run)
    sampling = Sampling(config.pairs_per_prompt, config.temperature, config.max_new_tokens)
    engine, published = run.rollout_engine(model, processor), SEMANTICS[run.config.semantics].published_grammar
    with awake(engine), run.progress.bar("pairs", -(-len(tasks) // batch), done=len(log.chunks)) as bar:
        for start in range(len(log.chunks) * batch, len(tasks), batch):
            run.stop.poll("sampling pairs", joint=True)
            mine = run.world.share(range(start, min(start + batch, len(tasks))))
            chunk = [tasks[i] for i in mine]
            prompts = [processor.encode_prompt(task.messages, task.images) for task in chunk]
            seeds = [derive_seed(run.config.seed, "pairs", i) for i in mine]
            groups = engine.generate(prompts, sampling, seeds, poll=lambda: run.stop.poll("sampling pairs"))
            log.append([[_student_texts(completion, processor, published) for completion in group] for group in groups])
            bar.advance(pairs=sum(isinstance(texts, dict) for done in log.chunks for group in done for texts in group))
    pairs, dropped = [], Counter({"cut": 0, "malformed": 0})
    for index, group in enumerate(group for done in log.chunks for group in done):
        uid = tasks.without_images(index).uid
        pairs += [OwnPair(index, uid, k, **texts) for k, texts in enumerate(group) if isinstance(texts, dict)]
        dropped.update(reason for reason in group if isinstance(reason, str))
    kept = {"pairs/kept": len(pairs), "pairs/dropped": dropped.total(), "pairs/cut": dropped["cut"]}
    run.metrics.write("warmup", 0, kept)
    if not pairs:
        raise WarmupError(_without_pairs(dropped, config.max_new_tokens))
    return pairs


def _without_pairs(dropped: Counter[str], max_new_tokens: int) -> str:
    """The message where no response can be paired."""
    causes = {
        "cut": f"cut at warmup.max_new_tokens={max_new_tokens}: raise it",
        "malformed": "malformed: the policy needs (more) SFT first",
    }
    told = "; ".join(f"{dropped[name]} {cause}" for name, cause in causes.items() if dropped[name])
    return f"none of {dropped.total()} sampled responses has the caption-think-answer form ({told})"


def _student_texts(completion: Completion, processor: Processor, published: bool) -> dict[str, str] | str:
    """The student's texts of a pair; ``cut`` or ``malformed`` where the response is invalid, the first if it reached
    the length limit, or spells out a control token."""
    split = split_tokens(completion.token_ids, processor.tokenizer, published=published)
    if not split.valid or holds_control_token(split.text):
        return "cut" if completion.finish_reason == "length" else "malformed"
    return {"student_caption": split.caption, "student_cot": split.reasoning, "student_response": split.text}


def group_pairs(pairs: Sequence[Pair], processor: Processor, semantics: str, spans: Sequence[str]) -> list[ScoredGroup]:
    """Pairs that share prompt and teacher become one group, in order of first appearance.

    Raises:
        ValueError: a pair lacks the texts of a span.
    """

    def framed(pair: Pair, side: Literal["teacher", "student"]) -> tuple[tuple[int, ...], ...]:
        texts = zip(spans, side_texts(pair, side, spans), strict=True)
        return tuple(frame_warmup(span, text, processor, semantics) for span, text in texts)

    prompts: dict[tuple, Prompt] = {}
    students: dict[tuple, list] = {}
    for i in range(len(pairs)):
        pair = pairs[i]
        encoded = processor.encode_prompt(pair.messages, pair.images)
        pixels = b"" if encoded.pixel_values is None else encoded.pixel_values.numpy().tobytes()
        key = (encoded.input_ids, pixels, framed(pair, "teacher"))
        prompts.setdefault(key, encoded)
        students.setdefault(key, []).append(framed(pair, "student"))
    return [ScoredGroup(prompts[key], key[2], students[key]) for key in prompts]


def differing_spans(groups: Sequence[ScoredGroup], spans: Sequence[str]) -> list[str]:
    """The spans of which at least one student's differs from its teacher's; the others have no margin."""
    return [
        span
        for k, span in enumerate(spans)
        if any(student[k] != group.teacher[k] for group in groups for student in group.students if student)
    ]


class HeldOut:
    """The newest held-out margins; they decide when the stage ends."""

    def __init__(self, spans: Sequence[str], awaited: Sequence[str]) -> None:
        """``awaited``: those of the ``spans`` whose margin must reach the target."""
        self.spans, self.awaited = spans, awaited
        self.margins: dict[str, float] = {}

    def observe(self, metrics: Metrics, world: World | None = None) -> Metrics:
        """Joint over ``world`` (None: one rank). Record the metrics of a scoring of the held-out pairs, of which each
        rank has a share; returns those of margin, accuracy and pairs."""
        values, recorded = metrics.read(None if world is None else world.gather), Metrics()
        self.margins = {}
        for kind in ("margin", "acc", "pairs"):
            for name in (f"{kind}_{span}" for span in self.spans):
                if f"warmup/heldout_{name}" in values:
                    self.margins[name] = values[f"warmup/heldout_{name}"]
                    recorded.last(f"warmup/heldout_{name}", self.margins[name])
        return recorded

    def enough(self, target: float) -> bool:
        return all(self.margins.get(f"margin_{span}", -math.inf) >= target for span in self.awaited)

    def state_dict(self) -> dict:
        return self.margins

    def load_state_dict(self, state: dict) -> None:
        self.margins = state


def warm_up(run: Run, discriminator: Discriminator, processor: Processor, pairs: Sequence[Pair]) -> Path:
    """Train the discriminator on pairs; returns the folder of its export.

    Raises:
        WarmupError: the held-out margin was not reached in ``warmup.max_updates``, the pairs have a single prompt, or
            no held-out text differs from its teacher's.
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
    if held < run.world.size:
        raise WarmupError(
            f"{held} held-out prompt(s) are fewer than the {run.world.size} ranks: raise warmup.heldout_share, or give "
            "pairs of more prompts"
        )
    budget = config.tokens_per_micro_batch
    check_before_sharding(run.config, discriminator.backbone, pairs, processor, end_states, budget=budget)
    engine = run.engine(discriminator, **planned(config.optimizer, config.max_updates))
    use_layout(run.config.layout, discriminator.backbone)
    differing = differing_spans(heldout, spans)
    equal = [span for span in spans if span not in differing]
    if not differing:
        raise WarmupError(
            f"in {len(heldout)} held-out prompt(s) every {' and '.join(equal)} of the policy equals its teacher's: "
            "there is nothing to tell apart. Give more or other pairs, or raise warmup.heldout_share"
        )
    for span in equal:
        text = f"warm-up: no held-out {span} differs from its teacher's; it has no margin, which is not waited for"
        run.console.print(text, style="yellow", markup=False, highlight=False)
    reached = HeldOut(spans, differing)
    budgets = {"discriminator": config.tokens_per_micro_batch}
    state = StageState(run, "warmup", engines={"discriminator": engine}, budgets=budgets, order=order, extra=reached)
    batching = Batching(run.config.layout, state.budgets["discriminator"], processor.pad_id, whole_groups=True)
    loss = discriminator_loss_of(run.config, warmup=True)
    trainer = DiscriminatorTrainer(engine, batching, loss, spans=spans, prefix="warmup/")

    def poll() -> None:
        run.stop.poll("held-out pairs")

    def enough() -> bool:
        return reached.enough(config.target_margin)

    shown = {"loss": "warmup/loss", **{f"heldout_{span}": f"warmup/heldout_margin_{span}" for span in differing}}
    for step in state.steps(config.max_updates, done=enough, shown=shown):
        metrics = state.held  # set where a stop interrupted the scoring of held-out pairs
        if metrics is None:
            chunk = [training[i] for i in run.world.share(order.next_indices(config.prompts))]
            with state.timer.part("update", learns=True):
                metrics = trainer.score_and_accumulate(chunk).metrics | trainer.step()
            state.hold(metrics)
        if step % config.eval_every == 0:
            with state.timer.part("validation"):
                scored = trainer.score(run.world.share(heldout), prefix="warmup/heldout_", poll=poll).metrics
                metrics |= reached.observe(scored, run.world)
        state.end_step(metrics)
    if not enough():
        shown = ", ".join(f"{k} {v:.3g}" for k, v in reached.margins.items()) or "never evaluated"
        raise WarmupError(
            f"{config.max_updates} updates left the held-out margin under {config.target_margin} ({shown}): "
            "raise warmup.max_updates or warmup.optimizer.lr, give more pairs, or lower warmup.target_margin"
        )
    return run.export("discriminator-warmup", engine, partial(save_discriminator, discriminator, processor))
