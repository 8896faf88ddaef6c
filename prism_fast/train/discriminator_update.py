"""Scoring and updating the discriminator in one forward: the scores are the rewards, their graph is the update.

Equal spans of one prompt are computed once. The teacher's spans therefore cost one pass per prompt, not one per
rollout, and a student span that equals the teacher's gets exactly the teacher's score: a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config
from prism_fast.models.discriminator import Discriminator, expert_choices, load_balance_loss
from prism_fast.models.forward import TokenBatch, collate, language_outputs
from prism_fast.models.processor import EncodedPrompt
from prism_fast.train.engine import LocalEngine
from prism_fast.train.microbatch import TokenBudget, by_tokens

Span = tuple[int, ...]


@dataclass(frozen=True)
class SpanGroup:
    """One prompt with the K framed spans of the teacher and of each student; ``None``: an invalid response.

    K = 2 (caption, reasoning), or 1 where whole responses are scored.
    """

    prompt: EncodedPrompt
    teacher: tuple[Span, ...]
    students: Sequence[tuple[Span, ...] | None]

    def unique_spans(self) -> list[Span]:
        """Distinct spans in order of first use."""
        return list(dict.fromkeys([*self.teacher, *(span for framed in self.students if framed for span in framed)]))

    def tokens(self) -> int:
        """Tokens of one forward of this group, prompt repeated per distinct span."""
        return sum(len(self.prompt.input_ids) + len(span) for span in self.unique_spans())


@dataclass(frozen=True)
class GroupScores:
    """Scores of a step, float32, on the CPU: ``student`` [B, K], ``teacher`` [G, K]; ``tokens`` of the forward that
    made them."""

    student: Tensor
    teacher: Tensor
    tokens: int


def loss_options(config: Config) -> dict[str, Any]:
    """The arguments of :func:`discriminator_step` that say what is learnt: the recipe's numbers, and where it gives
    none those of its semantics."""
    terms, given = SEMANTICS[config.semantics], config.align.discriminator
    return {
        "semantics": config.semantics,
        "score_clip": terms.score_clip if given.score_clip is None else given.score_clip,
        "score_reg": terms.score_reg if given.score_reg is None else given.score_reg,
    }


def discriminate(
    engine: LocalEngine, groups: Sequence[SpanGroup], budget: TokenBudget, *, learn: bool, **options: Any
) -> tuple[GroupScores, Tensor]:
    """:func:`discriminator_step` within the token budget: scores all groups and, with ``learn``, leaves the gradient in
    the engine.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        StepTooLargeError: the largest group alone does not fit into memory.
    """
    backward = engine.backward if learn else None
    return budget.run(
        lambda tokens: discriminator_step(
            engine.model, groups, backward=backward, tokens_per_micro_batch=tokens, **options
        ),
        discard=engine.discard,
        longest=max(group.tokens() for group in groups),
    )


def _lay_out(
    groups: Sequence[SpanGroup], model_config: Any, device: torch.device, pad_id: int, positions: str
) -> tuple[TokenBatch, list[list[int]], list[list[int]]]:
    """A row per distinct span of each group; the rows [G][K] of the teachers and [B][K] of the students (-1: none)."""
    prompt_of_row: list[int] = []
    spans: list[Span] = []
    teacher_rows: list[list[int]] = []
    student_rows: list[list[int]] = []
    for g, group in enumerate(groups):
        row_of = {span: len(spans) + i for i, span in enumerate(group.unique_spans())}
        prompt_of_row.extend([g] * len(row_of))
        spans.extend(row_of)
        teacher_rows.append([row_of[span] for span in group.teacher])
        nothing = [-1] * len(group.teacher)
        student_rows.extend([row_of[span] for span in framed] if framed else nothing for framed in group.students)
    batch = collate(
        [group.prompt for group in groups],
        prompt_of_row,
        spans,
        model_config=model_config,
        pad_id=pad_id,
        positions=positions,
    )
    return batch.to(device), teacher_rows, student_rows


def _forward(
    discriminator: Discriminator, batch: TokenBatch, teacher_rows: list[list[int]], student_rows: list[list[int]]
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...] | None]:
    """One forward.

    Returns:
        The scores to learn from (teacher [G, K], student [B, K], with gradient), the same without gradient and head
        dropout (the rewards), and the raw router logits.
    """
    out = discriminator(batch)
    learned = _gather(out.score, teacher_rows, student_rows)
    if discriminator.training and discriminator.v_head[0].p > 0:
        # The published head drops hidden units while it learns, never while it scores; the backbone is the same.
        with torch.no_grad():
            discriminator.v_head.eval()
            reward = _gather(discriminator.score_hidden(out.hidden), teacher_rows, student_rows)
            discriminator.v_head.train()
    else:
        reward = [scores.detach() for scores in learned]
    return learned, reward, out.router_logits


def _gather(score: Tensor, teacher_rows: list[list[int]], student_rows: list[list[int]]) -> list[Tensor]:
    """Scores per row of the batch to teacher [G, K] and student [B, K]; a student row of -1 (invalid) scores 0."""
    teacher = score[torch.tensor(teacher_rows, device=score.device)]
    index = torch.tensor(student_rows, device=score.device)
    return [teacher, torch.where(index >= 0, score[index.clamp(min=0)], 0.0)]


def discriminator_step(
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
    aux_coef: float = 0.0,
    positions: str = "mrope",
    poll: Callable[[], None] = lambda: None,
) -> tuple[GroupScores, Tensor]:
    """Score all groups and, with ``backward``, accumulate the gradient of the loss over all of them.

    But for ``released``, scores, loss and gradient do not depend on the cut into micro-batches.

    Args:
        backward: called with each micro-batch's loss and by name with the scores it comes from; ``None`` scores only.
        aux_coef: weight of the load-balancing loss over the routers of all layers (0: none).
        poll: called before each micro-batch; it may raise to stop.

    Returns:
        The scores before the update, and the loss (0-d float64, detached).
    """
    parts = by_tokens([group.tokens() for group in groups], tokens_per_micro_batch)
    columns = len(groups[0].teacher)
    valid_total = sum(1 for group in groups for framed in group.students if framed)
    rows_total = sum(len(group.students) for group in groups)
    # Divided by the counts of the whole step, so that the cut into micro-batches does not matter; as published, each
    # micro-batch is divided by its own counts and then weighted by its share of the rows.
    counts: dict[str, float] = {}
    if semantics != "released":
        counts = {"denominator": max(1, valid_total), "l2_denominator": columns * (len(groups) + valid_total)}
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group.students))
    student_found, student_rows, teacher_found = [], [], []
    loss_total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    layout = (discriminator.backbone.config, device, pad_id, positions)
    text = discriminator.backbone.config.text_config
    experts = (text.num_experts, text.num_experts_per_tok)
    choices = None
    if aux_coef and len(parts) > 1:
        # The load-balancing loss is a product of means over the step. Each micro-batch can add its share of the second
        # mean, which the gradient flows through, only once the first, the experts' shares of the choices, is known.
        batches = (_lay_out([groups[g] for g in part], *layout)[0] for part in parts)
        choices = torch.stack([_choices(discriminator, batch, experts) for batch in batches]).sum(0)
    with torch.set_grad_enabled(backward is not None):
        for part in parts:
            poll()
            members = [groups[g] for g in part]
            batch, *rows_of = _lay_out(members, *layout)
            learned, reward, router_logits = _forward(discriminator, batch, *rows_of)
            group_of_row = torch.tensor([i for i, m in enumerate(members) for _ in m.students], device=device)
            valid = torch.tensor([framed is not None for m in members for framed in m.students], device=device)
            loss, _ = discriminator_loss(
                *learned,
                group_of_row,
                valid,
                semantics=semantics,
                score_clip=score_clip,
                score_reg=score_reg,
                **counts,
            )
            if semantics == "released":
                loss = loss * (len(valid) / rows_total)
            if aux_coef:
                balance = load_balance_loss(router_logits, *experts, batch.attention_mask, choices=choices)
                loss = loss + aux_coef * balance
            if backward is not None:
                backward(loss, teacher_scores=learned[0], student_scores=learned[1])
            loss_total += loss.detach().double().cpu()
            teacher_found.append(reward[0].cpu())
            student_found.append(reward[1].cpu())
            student_rows += [r for g in part for r in range(offsets[g], offsets[g + 1])]
            tokens += int(batch.lengths.sum())
    student = torch.cat(student_found).float()[torch.tensor(student_rows).argsort()]
    teacher = torch.cat(teacher_found).float()[torch.tensor([g for part in parts for g in part]).argsort()]
    return GroupScores(student, teacher, tokens), loss_total


@torch.no_grad()
def _choices(discriminator: Discriminator, batch: TokenBatch, experts: tuple[int, int]) -> Tensor:
    """[E] how often each expert is chosen for the tokens of a batch: one forward without gradient or head."""
    out = language_outputs(discriminator.backbone, batch, output_router_logits=True)
    return expert_choices(out.router_logits, *experts, batch.attention_mask)
