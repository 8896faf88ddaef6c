"""The published schedule on our models.

Each of a rollout's two spans is scored by a forward of its own. The update computes four sequences per rollout, two of
them the teacher's, and so computes the same scores again. The policy runs twice over prompt and response of every
rollout; the update replaces the log-probs of the first run by its own. Each row encodes its image. Batches are made
beforehand on the device, because the published data loader makes them outside of the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.presets import policy_options
from prism_fast.models.forward import ResponseRows, TokenBatch, collate, language_outputs, response_rows

from .column import Column, Outcome
from .work import Models, Work

BUDGET = 8192  # tokens of prompts and responses per micro-batch, as published
CLIP, L2 = 10.0, 0.001


class PolicyPart(NamedTuple):
    batch: TokenBatch
    response: ResponseRows
    advantage: Tensor  # [rows]


class Published(Column):
    """``stock``: transformers' experts, materialised logits of all rows, losses in plain PyTorch. Otherwise our
    experts, output head and losses."""

    def __init__(self, name: str, models: Models, work: Work, *, stock: bool) -> None:
        super().__init__(name, models, work)
        self.stock = stock
        rows = max(1, BUDGET // (work.shape.prompt + work.shape.response))
        students = [work.spans(response) for response in work.responses]
        teacher = work.spans(work.teacher)
        self.alone = [[self._rows([span]) for span in framed] for framed in students]
        self.together = [
            [
                [self._rows([framed[k] for framed in students[i : i + rows]]) for k in range(2)],
                [self._rows([teacher[k]] * len(students[i : i + rows])) for k in range(2)],
            ]
            for i in range(0, len(students), rows)
        ]
        self.parts = []
        for i in range(0, len(students), rows):
            batch = self._rows(work.responses[i : i + rows])
            advantage = work.advantage[i : i + rows].to(self.device)
            self.parts.append(PolicyPart(batch, response_rows(batch), advantage))

    def _rows(self, continuations: list[tuple[int, ...]]) -> TokenBatch:
        copies = [replace(self.work.prompt) for _ in continuations]  # distinct objects: each row encodes its image
        return collate(
            copies,
            range(len(copies)),
            continuations,
            model_config=self.work.widths.policy,
            pad_id=self.work.widths.pad_id,
        ).to(self.device)

    def _scores(self, batch: TokenBatch) -> Tensor:
        """[rows] float32, with a graph if gradients are enabled."""
        hidden = language_outputs(self.discriminator.backbone, batch).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=self.device), batch.lengths - 1]
        return self.discriminator.score_hidden(last)

    @torch.no_grad()
    def score(self) -> None:
        self.discriminator.eval()
        self.student = torch.stack([torch.cat([self._scores(span) for span in framed]) for framed in self.alone])

    def update_discriminator(self) -> None:
        self.discriminator.train()
        self.discriminator_loss = 0.0
        for students, teachers in self.together:
            student = torch.stack([self._scores(batch) for batch in students], 1)  # [rows, 2]
            teacher = torch.stack([self._scores(batch) for batch in teachers], 1)  # [rows, 2]
            loss = self._pairs(teacher, student)
            self.discriminator_engine.backward(loss)
            self.discriminator_loss += float(loss.detach())
        self.teacher = teacher[0].detach()
        self.discriminator_engine.step()

    def _pairs(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Divided by counts of the whole step, so that the cut into micro-batches does not matter. A teacher's score
        occurs once per rollout here and counts once in the mean square."""
        n = self.work.shape.rollouts
        clamped = [score.clamp(-CLIP, CLIP) for score in (teacher, student)]
        squares = L2 * (clamped[0].square().sum() / n + clamped[1].square().sum()) / (2 * (1 + n))
        if self.stock:
            return torch.nn.functional.softplus(clamped[1] - clamped[0]).sum() / n + squares
        own = torch.arange(len(student), device=self.device)
        valid = torch.ones(len(student), dtype=torch.bool, device=self.device)
        loss, _ = discriminator_loss(teacher, student, own, valid, score_clip=CLIP, score_reg=0.0, denominator=n)
        return loss + squares

    def _logprobs(self, part: PolicyPart, *, entropy: bool) -> Tensor:
        """[rows · R] float32 of the response tokens."""
        hidden = language_outputs(self.policy.model, part.batch).last_hidden_state.flatten(0, 1)  # [rows · S, H]
        if not self.stock:
            found = self.policy.lm_head(hidden[part.response.index], part.response.target, entropy=entropy)
            return found.logp
        logits = self.policy.lm_head(hidden).float()  # [rows · S, V]
        total = logits.logsumexp(-1)
        following = part.batch.input_ids.flatten().roll(-1)
        logp = logits.gather(1, following[:, None])[:, 0] - total
        if entropy:
            _ = total - (logits.softmax(-1) * logits).sum(-1)
        return logp[part.response.index]

    @torch.no_grad()
    def old_logprobs(self) -> Tensor:
        """[n, R]"""
        self.policy.eval()
        found = torch.cat([self._logprobs(part, entropy=True) for part in self.parts])
        return found.view(self.work.shape.rollouts, -1)

    def update_policy(self) -> None:
        self.old_logprobs()
        self.policy.train()
        options = policy_options("prism", max_response=self.work.shape.response)
        denominator = self.work.shape.rollouts * self.work.shape.response
        self.policy_loss, self.gap = 0.0, 0.0
        sampled = torch.tensor(self.work.logprobs, device=self.device)
        start = 0
        for part in self.parts:
            logp = self._logprobs(part, entropy=False)
            if self.stock:
                loss = _clipped_loss(logp, part.advantage, options) / denominator
            else:
                loss, _ = ops.policy_loss(
                    logp,
                    part.advantage,
                    part.response.cu_seqlens,
                    denominator=torch.tensor(float(denominator), device=self.device),
                    options=options,
                )
            self.policy_engine.backward(loss)
            self.policy_loss += float(loss.detach())
            rows = len(part.advantage)
            gap = (logp.detach() - sampled[start : start + rows].flatten()).abs().max()
            self.gap, start = max(self.gap, float(gap)), start + rows
        self.policy_engine.step()

    def outcome(self) -> Outcome:
        return Outcome(
            self.student.float().cpu(), self.teacher.float().cpu(), self.discriminator_loss, self.policy_loss, self.gap
        )


def _clipped_loss(logp: Tensor, advantage: Tensor, options) -> Tensor:
    """Sum over tokens [rows · R]; as published, the update's own log-probs replace the old ones."""
    a = advantage.repeat_interleave(len(logp) // len(advantage))
    ratio = (logp - logp.detach()).clamp(-20.0, 20.0).exp()
    low, high = options.clip
    each = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return torch.where(a < 0, torch.minimum(each, -a * options.dual_clip), each).sum()
