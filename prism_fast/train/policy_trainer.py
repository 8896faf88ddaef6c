"""The policy's update: the gradient of a step's rollouts in any number of micro-batches, then one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.algorithms.presets import policy_options
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import AlignConfig, RlvrConfig
from prism_fast.engine.finite import NonFiniteError, refuse_non_finite
from prism_fast.engine.protocol import Engine
from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import Processor, Prompt
from prism_fast.models.transfer import moved
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.protocol import Completion
from prism_fast.track.metrics import Metrics
from prism_fast.train.batching import Batching, missing_passes, update_weights
from prism_fast.train.layouts import BatchPlan, Forward, MicroBatch
from prism_fast.train.passes import counted_passes
from prism_fast.train.reference import Reference
from prism_fast.train.rollout_gap import RolloutGap
from prism_fast.train.rollouts import StepRollouts
from prism_fast.train.self_check import self_check

if TYPE_CHECKING:
    from prism_fast.train.state import StageState


@dataclass(frozen=True)
class PolicyBatch:
    """The rollouts of one update: response b continues ``prompts[prompt_of[b]]``.

    ``advantage`` [B] float32 on the CPU. ``off_policy``: which responses earlier weights sampled (None: none of them).
    ``token_advantage``: where given, a tensor [n_b] for each response, float32 on the CPU, in place of its advantage.
    """

    prompts: Sequence[Prompt]
    prompt_of: Sequence[int]
    completions: Sequence[Completion]
    advantage: Tensor
    off_policy: Sequence[bool] | None = None
    token_advantage: Sequence[Tensor] | None = None

    @classmethod
    def of(
        cls,
        rollouts: StepRollouts,
        advantage: Tensor,
        token_advantage: Sequence[Tensor] | None = None,
        off_policy: Sequence[bool] | None = None,
    ) -> PolicyBatch:
        """All responses of ``rollouts``, in their order."""
        members = rollouts.group.tolist()
        return cls(rollouts.prompts, members, rollouts.completions, advantage, off_policy, token_advantage)

    def has_gradient(self) -> list[bool]:
        """Whether each response has a token whose advantage is not 0."""
        if self.token_advantage is None:
            return (self.advantage != 0).tolist()
        return [bool((tokens != 0).any()) for tokens in self.token_advantage]

    def groups(self, computed: Sequence[bool]) -> tuple[list[PromptGroup], list[list[int]]]:
        """The prompts with their responses, None for those not ``computed``; and the indices of each prompt's
        responses."""
        members: list[list[int]] = [[] for _ in self.prompts]
        for b, p in enumerate(self.prompt_of):
            members[p].append(b)
        groups = [
            PromptGroup(prompt, [self.completions[b].token_ids if computed[b] else None for b in members[p]])
            for p, prompt in enumerate(self.prompts)
        ]
        return groups, members


@dataclass(frozen=True)
class _Step:
    """``lengths`` [B] of a batch's responses; the loss's ``denominator`` (0-d on the device) and the number of
    ``responses``, both over all ranks. ``both_kinds``: every micro-batch calls the head once for on-policy and once for
    off-policy rows, because ranks go in lockstep and some rank has both."""

    batch: PolicyBatch
    lengths: Tensor
    denominator: Tensor
    responses: float
    both_kinds: bool


def response_states(plan: BatchPlan, batch: MicroBatch) -> tuple[Tensor, list[int]]:
    """For ``train.self_check``: the hidden states [N, H] that predict response tokens, and the responses' lengths."""
    computed = plan.forward(batch)
    return computed.hidden.index_select(0, computed.predict.index), computed.predict.cu_seqlens.diff().tolist()


class PolicyTrainer:
    """`accumulate` adds the gradient of rollouts, `step` updates the weights. No old-log-prob pass.

    The ratio of an on-policy response is 1 by construction. That of an off-policy one is taken to the log-probs it was
    sampled with, inside the loss's clip range: without it the gradient would be biased to the older policy's samples. A
    response without advantage has a gradient of exactly 0 and is not computed; it counts in the denominator. With a KL
    or entropy term every response has a gradient.

    Args:
        engine: of a policy whose ``lm_head`` is a ``LogProbHead``.
        temperature: of sampling.
        banned: tokens that are never sampled; log-probs must leave them out as sampling does.
        divide_by_micro_batch: as the published code does, compute every response, divide each micro-batch by its own
            counts and weigh it by its share of the responses. The loss then depends on the cut.
        gap: corrects on-policy responses for the gap to the rollout engine, and watches it. The ratio of an off-policy
            one contains that gap already.
        reference: for the KL term; needed where ``loss.kl_coef`` is not 0, and only there.
    """

    def __init__(
        self,
        engine: Engine,
        batching: Batching,
        loss: PolicyLossOptions,
        *,
        temperature: float,
        banned: Sequence[int] = (),
        divide_by_micro_batch: bool = False,
        gap: RolloutGap | None = None,
        reference: Reference | None = None,
    ) -> None:
        if (reference is not None) != (loss.kl_coef != 0):
            raise ValueError(f"a reference policy goes with a KL term, got kl_coef={loss.kl_coef} and {reference}")
        self.engine, self.batching, self.loss = engine, batching, loss
        self.temperature, self.banned = temperature, bool(banned)
        self.divide_by_micro_batch, self.gap = divide_by_micro_batch, gap
        self.policy, self.reference = engine.module, reference
        self._has_gradient = False
        self._learns_all = loss.kl_coef != 0 or loss.entropy_coef != 0
        if banned:
            self.policy.lm_head.ban(banned)
            if reference is not None:
                reference.ban(banned)

    def accumulate(self, batch: PolicyBatch) -> Metrics:
        """Add the gradient of ``batch`` to the engine's.

        Raises:
            NonFiniteError: an advantage, a log-prob or the loss is NaN or infinite, or a token lies outside the
                vocabulary; the gradient is dropped.
            StepTooLargeError: the longest response alone does not fit into memory.
            RolloutGapError: as `RolloutGap.check`.
        """
        self._refuse_advantage(batch.advantage)
        backbone = self.policy.model
        lengths = torch.tensor([len(completion.token_ids) for completion in batch.completions])
        has_gradient = batch.has_gradient()
        whole = self.divide_by_micro_batch or self._learns_all
        computed = [True] * len(has_gradient) if whole else has_gradient
        rows = sum(computed)
        if self.engine.lockstep and not rows:  # another rank may have passes, and needs this one's
            computed[int(lengths.argmin())] = True
        groups, members = batch.groups(computed)
        count, responses = self.engine.sum([self._count(lengths), len(lengths)])
        stale = batch.off_policy is not None and any(batch.off_policy)
        both_kinds = self.engine.lockstep and not self.engine.agree(not stale)
        step = _Step(batch, lengths, moved(torch.tensor(count), self.policy.device), responses, both_kinds)
        self.policy.train()

        def attempt(tokens: int) -> Metrics:
            metrics = Metrics()
            with counted_passes(backbone) as passes:
                plan = self.batching.plan(backbone, groups, tokens, lockstep=self.engine.lockstep)
                missing = missing_passes(self.engine, plan)
                reference = None
                if self.reference is not None:
                    reference = self.reference.plan(self.batching, groups, tokens, lockstep=self.engine.lockstep)
                for number in range(len(plan.micro_batches)):
                    self._learn(plan, reference, number, step, members, metrics)
                for _ in range(missing):
                    self._learn(plan, reference, -1, step, members, Metrics(), weight=0.0)
            return metrics | passes.metrics("policy")

        packing_error = self_check(self.engine, self.batching, backbone, groups, response_states)
        ops.bad_values(backbone.device)  # reset the counter
        metrics = self.batching.run(attempt, groups, self.engine)
        self._verify()
        if self.gap is not None:
            metrics |= self.gap.check(self.engine, metrics)
        self._has_gradient = self._has_gradient or rows > 0
        metrics |= self.batching.work(self.policy.config, groups, vocabulary=True)
        metrics.sum("policy/rows", rows)
        metrics.mean("policy/loss", 0.0, 1 / self.engine.ranks)  # the micro-batches have added their totals, count 0
        if packing_error is not None:
            metrics.last("policy/packing_error", packing_error)
        return metrics

    def step(self) -> Metrics:
        """Joint. Update the weights; without any response that has an advantage, on any rank, nothing is updated.

        Raises:
            NonFiniteError: the gradient norm is NaN or infinite; nothing was updated.
        """
        idle = self.engine.agree(not self._has_gradient)
        metrics = Metrics() if idle else update_weights(self.engine, "policy/")
        self._has_gradient = False
        metrics.sum("policy/bad_values", ops.bad_values(self.policy.device))
        return metrics | self.batching.budget_metrics("policy/")

    def _refuse_advantage(self, advantage: Tensor) -> None:
        """Joint. Raise NonFiniteError for an advantage that is not finite, on any rank."""
        fault = None
        try:
            refuse_non_finite(self.engine.where, advantage=advantage)
        except NonFiniteError as error:
            fault = error
        if not self.engine.agree(fault is None):
            raise fault or NonFiniteError(f"{self.engine.where}: an advantage of another rank is not finite")

    def _count(self, lengths: Tensor) -> float:
        """The loss's denominator for responses of these lengths."""
        return float(loss_denominator(self.loss.loss, lengths, aggregation=self.loss.aggregation))

    def _learn(
        self,
        plan: BatchPlan,
        reference: BatchPlan | None,
        number: int,
        step: _Step,
        members: list[list[int]],
        metrics: Metrics,
        *,
        weight: float | None = None,
    ) -> None:
        """Forward and backward of micro-batch ``number``. ``reference``: the same micro-batches of the reference
        policy; ``members``: of each group, the indices of its responses; ``weight``: of the loss."""
        micro_batch, ref_logp = plan.micro_batches[number], None
        if reference is not None:
            how = {"temperature": self.temperature, "banned": self.banned}
            ref_logp = self.reference.logprobs(self.engine, reference, reference.micro_batches[number], **how)  # [N]
        batch, lengths, denominator = step.batch, step.lengths, step.denominator
        responses = [members[g][k] for g, k in micro_batch.branches]
        if self.divide_by_micro_batch:
            denominator = moved(torch.tensor(self._count(lengths[responses])), self.policy.device)
        off_policy = [batch.off_policy is not None and batch.off_policy[b] for b in responses]

        def losses() -> list[tuple[Tensor, Tensor]]:
            forward = plan.forward(micro_batch)
            computed = []
            for old in (False, True):
                places = [k for k, is_old in enumerate(off_policy) if is_old == old]
                shared = (forward, ref_logp, batch, responses)
                if places:
                    computed.append(self._loss(*shared, places, lengths, denominator, old, metrics))
                elif step.both_kinds:
                    loss, _ = self._loss(*shared, [0], lengths, denominator, old, Metrics())
                    computed.append((loss * 0, loss.new_empty(0)))
            return computed

        computed = self.engine.run(losses)
        loss = torch.stack([loss for loss, _ in computed]).sum()
        if self.divide_by_micro_batch:
            loss = loss * (len(responses) / step.responses)
        if weight is not None:
            loss = loss * weight
        self.engine.backward(loss, logp=torch.cat([logp for _, logp in computed]))
        plan.finish(micro_batch, self.engine.backward)
        metrics.mean("policy/loss", loss.detach(), 0)
        metrics.sum("policy/tokens", micro_batch.tokens)

    def _loss(
        self,
        forward: Forward,
        ref_logp: Tensor | None,
        batch: PolicyBatch,
        responses: list[int],
        places: list[int],
        lengths: Tensor,
        denominator: Tensor,
        off_policy: bool,
        metrics: Metrics,
    ) -> tuple[Tensor, Tensor]:
        """The loss 0-d and the log-probs [N] of the responses at ``places`` of a micro-batch."""
        device = forward.hidden.device
        hidden, target, cu_seqlens, rows = rows_of(forward, lengths[responses].tolist(), places)
        chosen = [responses[k] for k in places]
        sampled = moved(torch.tensor([x for b in chosen for x in batch.completions[b].logprobs]), device)  # [N]
        advantage: dict[str, Tensor | None] = {"advantage": moved(batch.advantage[chosen], device)}
        if batch.token_advantage is not None:
            tokens = torch.cat([batch.token_advantage[b] for b in chosen])
            advantage = {"advantage": None, "token_advantage": moved(tokens, device)}
        is_weight = None
        if not off_policy and self.gap is not None and self.gap.corrects:
            with torch.no_grad():
                own = self.policy.lm_head(hidden, target, temperature=self.temperature, banned=self.banned).logp
            is_weight = self.gap.weights(sampled, own, cu_seqlens, metrics)
        loss, stats, logp = self.policy.lm_head.policy_loss(
            hidden,
            target,
            cu_seqlens=cu_seqlens,
            options=self.loss,
            old_logp=sampled if off_policy else None,
            is_weight=is_weight,
            ref_logp=ref_logp if ref_logp is None or rows is None else ref_logp[rows],
            denominator=denominator,
            temperature=self.temperature,
            banned=self.banned,
            borders=offsets(lengths[chosen].tolist()) if off_policy else None,
            **advantage,
        )
        if batch.off_policy is not None and any(batch.off_policy):  # otherwise every ratio is 1
            clipped = stats.clip_fraction_low + stats.clip_fraction_high
            metrics.mean("policy/clip_fraction", clipped * stats.tokens, stats.tokens)
            metrics.mean("policy/approx_kl", stats.approx_kl * stats.tokens, stats.tokens)
            metrics.max("policy/ratio_max", stats.ratio_max)
        if self.loss.kl_coef:
            metrics.mean("policy/kl", stats.kl * stats.tokens, stats.tokens)
        if self.loss.entropy_coef:
            metrics.mean("policy/entropy_bonus", self.loss.entropy_coef * stats.entropy * stats.tokens, stats.tokens)
        if not off_policy:
            gap = (logp - sampled).abs()
            metrics.mean("rollout/logprob_gap_mean", gap.sum(dtype=torch.float64), gap.numel())
            metrics.max("rollout/logprob_gap_max", gap.max())
        return loss, logp

    def _verify(self) -> None:
        """The engine's check; where tokens outside the vocabulary are the cause, the error counts them."""
        try:
            self.engine.verify()
        except NonFiniteError as error:
            bad = ops.bad_values(self.policy.device)
            if not bad:
                raise
            raise NonFiniteError(
                f"{error}: {bad} response tokens lie outside the {self.policy.lm_head.out_features} rows of the output "
                "matrix; do tokenizer and model belong together?"
            ) from None


def offsets(lengths: Sequence[int]) -> list[int]:
    """[0, l_0, l_0 + l_1, …]."""
    return [0, *accumulate(lengths)]


def rows_of(
    forward: Forward, lengths: Sequence[int], places: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The rows of a forward's continuations at ``places``: hidden states [N, H] that predict their tokens, the tokens
    [N], offsets [B+1] int32, and which of all response tokens they are: [N] int64, None for all. ``lengths``: tokens of
    all its continuations."""
    predict = forward.predict
    if len(places) == len(lengths):
        return forward.hidden.index_select(0, predict.index), predict.target, predict.cu_seqlens, None
    starts = offsets(lengths)
    rows = moved(torch.tensor([i for k in places for i in range(starts[k], starts[k + 1])]), predict.index.device)
    cu_seqlens = torch.tensor(offsets([lengths[k] for k in places]), dtype=torch.int32)
    hidden = forward.hidden.index_select(0, predict.index[rows])
    return hidden, predict.target[rows], moved(cu_seqlens, predict.index.device), rows


def response_metrics(completions: Sequence[Completion]) -> Metrics:
    """Count, lengths, entropy and the share of responses cut at the limit."""
    metrics = Metrics()
    metrics.sum("rollout/responses", len(completions))
    for completion in completions:
        length = len(completion.token_ids)
        metrics.mean("response_length/mean", length)
        metrics.max("response_length/max", length)
        metrics.mean("response_length/clip_ratio", int(completion.finish_reason == "length"))
        if completion.entropy is not None:
            metrics.mean("policy/entropy", completion.entropy * length, length)
    return metrics


def trainer_of(
    config: AlignConfig | RlvrConfig, state: StageState, processor: Processor, reference: Reference | None
) -> PolicyTrainer:
    """The policy's trainer of the stage of ``state``, as its ``config`` says."""
    run, sampling = state.run.config, config.rollout
    return PolicyTrainer(
        state.engines["policy"],
        Batching(run.layout, state.budgets["policy"], processor.pad_id),
        policy_options(config.loss, max_response=sampling.max_new_tokens, **config.loss_terms.options()),
        temperature=sampling.temperature,
        banned=processor.banned_ids,
        divide_by_micro_batch=SEMANTICS[run.semantics].divide_by_micro_batch,
        gap=state.rollout_gap(),
        reference=reference,
    )
