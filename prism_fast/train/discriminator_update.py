"""Scoring and updating the discriminator in one forward: the scores are the rewards, their graph is the update.

Equal spans of one prompt are computed once. The teacher's spans therefore cost one pass per prompt, not one per
rollout, and a student span that equals the teacher's gets exactly the teacher's score: a tie. In packed rows the prompt
and its image are computed once as well: a step costs P + all its spans' tokens per prompt.

The loss couples the spans of a group. A packed group that is cut into several rows is therefore scored first without
gradient; the loss of its head's inputs gives every row's gradient there, and the rows are computed again to send it
on. `GroupScores.repeated` counts those tokens; a larger token budget avoids them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_fast.algorithms.alignment_loss import as_scored, discriminator_loss
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import Discriminator, expert_choices, load_balance_loss
from prism_fast.models.experts import chosen_experts
from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import EncodedPrompt
from prism_fast.models.transfer import moved
from prism_fast.train.expert_shares import ExpertShares
from prism_fast.train.layouts import Ends, Layout, Part, Step, lay_out, longest_item
from prism_fast.train.microbatch import TokenBudget
from prism_fast.train.passes import Passes, counted_passes
from prism_fast.train.self_check import self_check

Span = tuple[int, ...]


@dataclass(frozen=True)
class SpanGroup:
    """One prompt with the K framed spans of the teacher and of each student; ``None``: an invalid response.

    K = 2 (caption, reasoning), or 1 where whole responses are scored.
    """

    prompt: EncodedPrompt
    teacher: tuple[Span, ...]
    students: Sequence[tuple[Span, ...] | None]

    def spans(self) -> list[tuple[int, Span]]:
        """What is computed: each distinct span once, in order of first use, with the number of its score."""
        framed = (self.teacher, *(student for student in self.students if student))
        columns: dict[Span, int] = {}
        for spans in framed:
            for column, span in enumerate(spans):
                columns.setdefault(span, column)
        return [(column, span) for span, column in columns.items()]

    def unique_spans(self) -> list[Span]:
        """The spans alone."""
        return [span for _, span in self.spans()]

    def computed(self) -> PromptGroup:
        """What a forward computes: the prompt and its spans."""
        return PromptGroup(self.prompt, self.unique_spans())


class GroupScores(NamedTuple):
    """Scores of a step, float32, on the CPU: ``student`` [B, K], ``teacher`` [G, K]; ``tokens`` of the forward that
    made them, ``repeated`` those of them that were computed twice because their group was cut; ``experts``: the numbers
    of ``expert_shares``; ``packing_error``: what ``train.self_check`` found; ``passes`` that
    ran, filled in by :func:`discriminate`."""

    student: Tensor
    teacher: Tensor
    tokens: int
    repeated: int
    experts: dict[str, float | int]
    packing_error: float | None = None
    passes: Passes | None = None

    def numbers(self) -> dict[str, float | int | None]:
        """What the forward cost and where it sent its tokens, for the metrics."""
        cost = {"tokens": self.tokens, "tokens_repeated": self.repeated, "packing_error": self.packing_error}
        return cost | self.experts


def loss_options(config: Config, *, warmup: bool = False) -> dict[str, Any]:
    """The arguments of :func:`discriminator_step` that say what is learnt: the recipe's numbers, and where it gives
    none those of its semantics. The published warm-up has neither clamp nor regulariser."""
    terms, given = SEMANTICS[config.semantics], config.align.discriminator
    clip, reg = (None, 0.0) if warmup and config.semantics == "released" else (terms.score_clip, terms.score_reg)
    return {
        "semantics": config.semantics,
        "score_clip": clip if given.score_clip is None else given.score_clip,
        "score_reg": reg if given.score_reg is None else given.score_reg,
        "length_penalty": given.length_penalty,
        "spread": given.spread,
    }


def end_states(step: Step, part: Part) -> tuple[Tensor, list[int]]:
    """For ``train.self_check``: what scores read of a forward, the last hidden state [M, H] of each span."""
    hidden = step.ends(part).hidden
    return hidden, [1] * len(hidden)


def discriminate(
    engine: LocalEngine,
    groups: Sequence[SpanGroup],
    budget: TokenBudget,
    *,
    learn: bool,
    layout: Layout,
    **options: Any,
) -> tuple[GroupScores, Tensor]:
    """:func:`discriminator_step` within the token budget: scores all groups and, with ``learn``, leaves the gradient in
    the engine.

    Raises:
        NonFiniteError: with ``learn``, the loss or a score is NaN or infinite; no gradient is left.
        StepTooLargeError: the largest piece that cannot be cut does not fit into memory.
    """
    computed = [group.computed() for group in groups]
    checked = {"pad_id": options["pad_id"], "positions": options.get("positions", "mrope"), "budget": budget.tokens}
    error = self_check(engine, layout, engine.module.backbone, computed, end_states, **checked)
    backward = engine.backward if learn else None

    def attempt(tokens: int) -> tuple[Callable[[], tuple[GroupScores, Tensor]], Passes]:
        with counted_passes(engine.module.backbone) as passes:
            found = queue_step(
                engine.module, groups, backward=backward, tokens_per_micro_batch=tokens, layout=layout, **options
            )
        return found, passes

    read_back, passes = budget.run(
        attempt,
        discard=engine.discard,
        longest=longest_item(layout, computed, whole_groups=True),
    )
    engine.verify()  # before the scores reward anything
    scores, loss = read_back()
    return scores._replace(packing_error=error, passes=passes), loss


def _scores(
    discriminator: Discriminator, hidden: Tensor, spans: Sequence[tuple[int, Span]], groups: Sequence[SpanGroup]
) -> tuple[list[Tensor], list[Tensor]]:
    """The head on the last hidden states [M, H] of ``spans``, (group, span) each, of whole ``groups`` (by number).

    Returns:
        The scores to learn from (teacher [G, K], student [B, K], with gradient), and the same without gradient and
        head dropout (the rewards).
    """
    place = {span: i for i, span in enumerate(spans)}
    members = list(dict.fromkeys(g for g, _ in spans))

    def rows(g: int, framed: tuple[Span, ...]) -> list[int]:
        return [place[g, span] for span in framed]

    teacher = [rows(g, groups[g].teacher) for g in members]
    invalid = [-1] * len(groups[members[0]].teacher)
    student = [rows(g, framed) if framed else invalid for g in members for framed in groups[g].students]
    learned = _gather(discriminator.score_hidden(hidden), teacher, student)
    if discriminator.training and discriminator.v_head[0].p > 0:
        # The published head drops hidden units while it learns, never while it scores; the backbone is the same.
        with torch.no_grad():
            discriminator.v_head.eval()
            reward = _gather(discriminator.score_hidden(hidden), teacher, student)
            discriminator.v_head.train()
        return learned, reward
    return learned, [scores.detach() for scores in learned]


def _gather(score: Tensor, teacher_rows: list[list[int]], student_rows: list[list[int]]) -> list[Tensor]:
    """Scores [M] to teacher [G, K] and student [B, K]; a student's -1 (invalid) scores 0."""
    teacher = score[moved(torch.tensor(teacher_rows), score.device)]
    index = moved(torch.tensor(student_rows), score.device)
    return [teacher, torch.where(index >= 0, score[index.clamp(min=0)], 0.0)]


def _lengths(groups: Sequence[SpanGroup], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the teachers' [G, K] and the students' spans [B, K]; an invalid response has none."""
    nothing = ((),) * len(groups[0].teacher)
    students = [framed or nothing for group in groups for framed in group.students]
    rows = ([list(map(len, framed)) for framed in side] for side in ([group.teacher for group in groups], students))
    teacher, student = (moved(torch.tensor(side), device) for side in rows)
    return teacher, student


class _Reader:
    """One step's spans and the forwards that read their ends."""

    def __init__(self, discriminator: Discriminator, groups: Sequence[SpanGroup], step: Step, aux_coef: float) -> None:
        text = discriminator.backbone.config.text_config
        self.discriminator, self.step, self.aux_coef = discriminator, step, aux_coef
        self.experts = (text.num_experts, text.num_experts_per_tok)
        self.keys = [group.spans() for group in groups]
        self.choices: Tensor | None = None
        if aux_coef and len(step.parts) > 1:
            # The load-balancing loss is a product of means over the step. Each micro-batch can add its share of the
            # second mean, which the gradient flows through, only once the first, the experts' shares of the choices, is
            # known.
            self.choices = self._choices()

    def spans(self, part: Part) -> list[tuple[int, Span]]:
        """(group, span) of the part's branches."""
        return [(g, self.keys[g][k][1]) for g, k in part.branches]

    def kinds(self, part: Part) -> list[int]:
        """Of each branch, the number of the score that is read at its end."""
        return [self.keys[g][k][0] for g, k in part.branches]

    def ends(self, part: Part) -> Ends:
        return self._ends(self.step, part, logits=bool(self.aux_coef))

    def _ends(self, step: Step, part: Part, *, logits: bool) -> Ends:
        wanted = {"output_router_logits": True} if logits else {}
        return step.ends(part, **wanted)

    def balance(self, computed: Ends) -> Tensor | float:
        """This forward's share of the load-balancing loss, weighted; 0.0 where there is none."""
        if not self.aux_coef:
            return 0.0
        loss = load_balance_loss(computed.router_logits, *self.experts, computed.weight, choices=self.choices)
        return self.aux_coef * loss

    @torch.no_grad()
    def _choices(self) -> Tensor:
        """[E] how often each expert is chosen for the tokens of the step: one forward without gradient or head."""
        apart = self.step.apart()
        counts = []
        for part in self.step.parts:
            computed = self._ends(apart, part, logits=True)
            counts.append(expert_choices(computed.router_logits, *self.experts, computed.weight))
        return torch.stack(counts).sum(0)

    def repeat(
        self, unit: Sequence[Part], upstream: Tensor, backward: Callable[..., None], poll: Callable[[], None]
    ) -> list[Tensor]:
        """Compute the parts of a cut group again and send ``upstream`` [M, H], the loss's gradient at the ends of their
        spans, through each; returns what each adds to the loss (0-d float64, on the device)."""
        added = []
        for part, gradient in zip(unit, upstream.split([len(part.branches) for part in unit]), strict=True):
            poll()
            computed = self.ends(part)
            aux = self.balance(computed)
            backward((computed.hidden * gradient).sum() + aux)
            self.step.finish(part, backward)
            added.append((upstream.new_zeros((), dtype=torch.float64) + aux).detach())
        return added


def discriminator_step(*arguments: Any, **options: Any) -> tuple[GroupScores, Tensor]:
    """:func:`queue_step`, waited for: the scores before the update, and the loss (0-d float64)."""
    return queue_step(*arguments, **options)()


def queue_step(
    discriminator: Discriminator,
    groups: Sequence[SpanGroup],
    *,
    backward: Callable[..., None] | None,
    pad_id: int,
    device: torch.device,
    semantics: str,
    score_clip: float | None,
    score_reg: float,
    tokens_per_micro_batch: int,
    layout: Layout,
    length_penalty: float = 0.0,
    spread: float = 0.0,
    aux_coef: float = 0.0,
    positions: str = "mrope",
    poll: Callable[[], None] = lambda: None,
) -> Callable[[], tuple[GroupScores, Tensor]]:
    """Score all groups and, with ``backward``, accumulate the gradient of the loss over all of them.

    But for ``released``, scores, loss and gradient do not depend on the cut into micro-batches.

    Args:
        backward: called with each micro-batch's loss and by name with the scores it comes from; ``None`` scores only.
        length_penalty: b in score - b * log(1 + tokens of the span), which is what is learned from and what rewards.
        spread: weight of ``pairwise_loss``'s term of that name.
        aux_coef: weight of the load-balancing loss over the routers of all layers (0: none).
        poll: called before each micro-batch; it may raise to stop.

    Returns:
        A function that waits for the device and gives the scores before the update and the loss (0-d float64): until it
        is called, the host waits for nothing.
    """
    columns = len(groups[0].teacher)
    valid_total = sum(1 for group in groups for framed in group.students if framed)
    rows_total = sum(len(group.students) for group in groups)
    # Divided by the counts of the whole step, so that the cut into micro-batches does not matter; as published, each
    # micro-batch is divided by its own counts and then weighted by its share of the rows.
    counts: dict[str, float] = {}
    if semantics != "released":
        counts = {"denominator": max(1, valid_total), "l2_denominator": columns * (len(groups) + valid_total)}
    step = lay_out(
        layout,
        discriminator.backbone,
        [group.computed() for group in groups],
        tokens_per_micro_batch,
        pad_id=pad_id,
        positions=positions,
        whole_groups=True,
    )
    reader = _Reader(discriminator, groups, step, aux_coef)
    shares = ExpertShares(columns, reader.experts[0])

    def pairs_loss(learned: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        group_of_row = moved(torch.tensor([i for i, g in enumerate(members) for _ in groups[g].students]), device)
        valid = moved(torch.tensor([framed is not None for g in members for framed in groups[g].students]), device)
        options = {"semantics": semantics, "score_clip": score_clip, "score_reg": score_reg, "spread": spread, **counts}
        if length_penalty:
            options |= {"lengths": _lengths([groups[g] for g in members], device), "length_penalty": length_penalty}
        loss, _ = discriminator_loss(*learned, group_of_row, valid, **options)
        return loss * (len(valid) / rows_total) if semantics == "released" else loss

    found: dict[int, tuple[Tensor, Tensor]] = {}  # per group: rewards of the teacher [K] and of the students [n, K]
    loss_total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = repeated = 0
    with torch.set_grad_enabled(backward is not None):
        for unit in step.units():
            cut = backward is not None and len(unit) > 1  # scored first, learned from in a second pass
            aux, hidden = 0.0, []
            with torch.set_grad_enabled(backward is not None and not cut):
                if cut:
                    step.announce(unit)
                for part in unit:
                    poll()
                    with chosen_experts(discriminator.backbone) as chosen:
                        computed = reader.ends(part)
                    shares.add(chosen, reader.kinds(part), computed.branch, computed.weight)
                    hidden.append(computed.hidden)
                    aux = aux if cut else aux + reader.balance(computed)
                    tokens += part.tokens
            ends = torch.cat(hidden)  # [M, H]
            if cut:
                ends.requires_grad_()
            learned, reward = _scores(
                discriminator, ends, [span for part in unit for span in reader.spans(part)], groups
            )
            members = list(dict.fromkeys(g for part in unit for g, _ in part.branches))
            if length_penalty:
                tokens_of = _lengths([groups[g] for g in members], device)
                reward = [as_scored(x, n, length_penalty, None) for x, n in zip(reward, tokens_of, strict=True)]
            loss = pairs_loss(learned, members) + aux
            if backward is not None:
                backward(loss, teacher_scores=learned[0], student_scores=learned[1])
            loss_total += loss.detach().double()
            if cut:
                for added in reader.repeat(unit, ends.grad, backward, poll):
                    loss_total += added
                repeated += sum(part.tokens for part in unit)
            else:
                for part in unit:
                    step.finish(part, backward)
            students = reward[1].float().split([len(groups[g].students) for g in members])
            for g, teacher, student in zip(members, reward[0].float(), students, strict=True):
                found[g] = (teacher, student)

    def read_back() -> tuple[GroupScores, Tensor]:
        teacher = torch.stack([found[g][0] for g in range(len(groups))]).cpu()
        student = torch.cat([found[g][1] for g in range(len(groups))]).cpu()
        return GroupScores(student, teacher, tokens, repeated, shares.numbers()), loss_total.cpu()

    return read_back
