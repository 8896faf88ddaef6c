"""Scoring and updating the discriminator in one forward: the scores are the rewards, their graph is the update.

Equal spans of one prompt are computed once. The teacher's spans therefore cost one pass per prompt, not one per
rollout, and a student span that equals the teacher's gets exactly the teacher's score: a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.models.discriminator import Discriminator, load_balance_loss
from prism_fast.models.forward import collate
from prism_fast.models.processor import EncodedPrompt
from prism_fast.train.microbatch import by_tokens

Span = tuple[int, ...]


@dataclass(frozen=True)
class SpanGroup:
    """One prompt with the framed (caption, reasoning) spans of teacher and students; ``None``: an invalid response."""

    prompt: EncodedPrompt
    teacher: tuple[Span, Span]
    students: Sequence[tuple[Span, Span] | None]

    def unique_spans(self) -> list[Span]:
        """Distinct spans in order of first use."""
        return list(dict.fromkeys([*self.teacher, *(span for pair in self.students if pair for span in pair)]))

    def tokens(self) -> int:
        """Tokens of one forward of this group, prompt repeated per distinct span."""
        return sum(len(self.prompt.input_ids) + len(span) for span in self.unique_spans())


@dataclass(frozen=True)
class GroupScores:
    """Scores of a step, float32, on the CPU: ``student`` [B, 2], ``teacher`` [G, 2]; columns caption, reasoning."""

    student: Tensor
    teacher: Tensor
    tokens: int


def _forward(
    discriminator: Discriminator, groups: Sequence[SpanGroup], device: torch.device, pad_id: int, positions: str
):
    """One forward of some groups.

    Returns:
        The scores to learn from (teacher [G, 2], student [B, 2], with gradient), the same without gradient and head
        dropout (the rewards), the raw router logits, and the batch.
    """
    prompt_of_row: list[int] = []
    spans: list[Span] = []
    teacher_rows: list[list[int]] = []
    student_rows: list[list[int]] = []
    for g, group in enumerate(groups):
        row_of = {span: len(spans) + i for i, span in enumerate(group.unique_spans())}
        prompt_of_row.extend([g] * len(row_of))
        spans.extend(row_of)
        teacher_rows.append([row_of[span] for span in group.teacher])
        student_rows.extend([row_of[span] for span in pair] if pair else [-1, -1] for pair in group.students)
    batch = collate(
        [group.prompt for group in groups],
        prompt_of_row,
        spans,
        model_config=discriminator.backbone.config,
        pad_id=pad_id,
        positions=positions,
    ).to(device)
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
    return learned, reward, out.router_logits, batch


def _gather(score: Tensor, teacher_rows: list[list[int]], student_rows: list[list[int]]) -> list[Tensor]:
    """Scores per row of the batch to teacher [G, 2] and student [B, 2]; a student row of -1 (invalid) scores 0."""
    teacher = score[torch.tensor(teacher_rows, device=score.device)]
    index = torch.tensor(student_rows, device=score.device)
    return [teacher, torch.where(index >= 0, score[index.clamp(min=0)], 0.0)]


def discriminator_step(
    discriminator: Discriminator,
    groups: Sequence[SpanGroup],
    *,
    backward,
    pad_id: int,
    device: torch.device,
    semantics: str,
    score_clip: float,
    score_reg: float,
    tokens_per_micro_batch: int,
    aux_coef: float = 0.0,
    positions: str = "mrope",
) -> tuple[GroupScores, Tensor]:
    """Score all groups and, with ``backward``, accumulate the gradient of the loss over all of them.

    Args:
        backward: called with each micro-batch's loss; ``None`` scores only.
        aux_coef: weight of the load-balancing loss over the routers of all layers (0: none).

    Returns:
        The scores before the update, and the loss (0-d float64, detached).
    """
    parts = by_tokens([group.tokens() for group in groups], tokens_per_micro_batch)
    valid_total = sum(1 for group in groups for pair in group.students if pair)
    rows_total = sum(len(group.students) for group in groups)
    # Divided by the counts of the whole step, so that the cut into micro-batches does not matter; as published, each
    # micro-batch is divided by its own counts and then weighted by its share of the rows.
    counts: dict[str, float] = {}
    if semantics != "released":
        counts = {"denominator": max(1, valid_total), "l2_denominator": 2 * (len(groups) + valid_total)}
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group.students))
    student_all = torch.zeros(rows_total, 2)
    teacher_all = torch.zeros(len(groups), 2)
    loss_total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with torch.set_grad_enabled(backward is not None):
        for part in parts:
            members = [groups[g] for g in part]
            learned, reward, router_logits, batch = _forward(discriminator, members, device, pad_id, positions)
            group_of_row = torch.tensor([i for i, m in enumerate(members) for _ in m.students], device=device)
            valid = torch.tensor([pair is not None for m in members for pair in m.students], device=device)
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
                config = discriminator.backbone.config.text_config
                balance = load_balance_loss(
                    router_logits, config.num_experts, config.num_experts_per_tok, batch.attention_mask
                )
                loss = loss + aux_coef * balance * (len(members) / len(groups))
            if backward is not None:
                backward(loss)
            loss_total += loss.detach().double().cpu()
            teacher_all[part] = reward[0].float().cpu()
            rows = [r for g in part for r in range(offsets[g], offsets[g + 1])]
            student_all[rows] = reward[1].float().cpu()
            tokens += int(batch.lengths.sum())
    return GroupScores(student_all, teacher_all, tokens), loss_total
