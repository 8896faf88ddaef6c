"""One policy update: response rows only, any number of micro-batches, rows of earlier weights by importance ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import EncodedPrompt
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.protocol import Completion
from prism_fast.train.engine import LocalEngine, NonFiniteError, refuse_non_finite
from prism_fast.train.layouts import Forward, Layout, Part, Step, lay_out, longest_item
from prism_fast.train.microbatch import TokenBudget
from prism_fast.train.passes import Passes, counted_passes
from prism_fast.train.self_check import self_check


@dataclass(frozen=True)
class PolicyBatch:
    """A step's rollouts: row b is ``prompts[prompt_of_row[b]]`` continued by ``completions[b]``."""

    prompts: Sequence[EncodedPrompt]
    prompt_of_row: Sequence[int]
    completions: Sequence[Completion]
    advantage: Tensor  # [B] float32 on the CPU
    stale: Sequence[bool] | None = None  # rows that earlier weights sampled; None: the weights of now sampled all

    def groups(self, active: Sequence[bool]) -> tuple[list[PromptGroup], list[list[int]]]:
        """The prompts with their continuations, None for rows that are not ``active``, and which row each one is."""
        rows: list[list[int]] = [[] for _ in self.prompts]
        for b, p in enumerate(self.prompt_of_row):
            rows[p].append(b)
        groups = [
            PromptGroup(prompt, [self.completions[b].token_ids if active[b] else None for b in rows[p]])
            for p, prompt in enumerate(self.prompts)
        ]
        return groups, rows


def response_states(step: Step, part: Part) -> tuple[Tensor, list[int]]:
    """What the update reads of a forward: hidden states [N, H] that predict response tokens, and the responses'
    lengths."""
    computed = step.forward(part)
    return computed.hidden.index_select(0, computed.predict.index), computed.predict.cu_seqlens.diff().tolist()


def token_logprobs(model, computed: Forward, *, temperature: float, banned: bool = False) -> Tensor:
    """Log-probs [N] float32 of the continuation tokens of a forward, with gradient, by the model's
    :class:`LogProbHead`: no other row reaches it. ``banned``: without the tokens that its ``ban`` named."""
    hidden = computed.hidden.index_select(0, computed.predict.index)  # [N, H]
    return model.lm_head(hidden, computed.predict.target, temperature=temperature, banned=banned).logp


def update_policy(
    engine: LocalEngine,
    batch: PolicyBatch,
    options: PolicyLossOptions,
    *,
    temperature: float,
    pad_id: int,
    budget: TokenBudget,
    device: torch.device,
    layout: Layout,
    banned: Sequence[int] = (),
    released: bool = False,
) -> dict[str, float | int | None]:
    """One optimizer step on the batch. No old-log-prob and no reference pass.

    The ratio of a fresh row is 1 by construction. A stale row is weighed against the log-probs it was sampled with,
    inside the loss's clip range: taken as fresh, its gradient would be that of another policy's samples.
    Rows with advantage exactly 0 have a gradient of exactly 0 and are not computed; they count in the denominator.

    Args:
        banned: tokens that the rollout engine never samples; without them the policy that learns would not be the one
            that sampled.
        released: as the published code does, every row is computed and each micro-batch divided by its own counts and
            weighted by its share of the rows, so that the loss depends on the cut.

    Raises:
        NonFiniteError: an advantage, a log-prob, the loss or the gradient is NaN or infinite, or a token lies outside
            the vocabulary; nothing was updated.
        StepTooLargeError: the longest row alone does not fit into memory.
    """
    refuse_non_finite(engine.where, advantage=batch.advantage)
    model = engine.model
    model.lm_head.ban(banned)
    lengths = torch.tensor([len(c.token_ids) for c in batch.completions])
    denominator = loss_denominator(options.loss, lengths, aggregation=options.aggregation).to(device)
    contributes = ((batch.advantage != 0) | released).tolist()
    groups, row_of = batch.groups(contributes)
    stale = [False] * len(batch.completions) if batch.stale is None else list(batch.stale)
    model.train()

    def accumulate(tokens: int) -> tuple[float, int, list[Tensor], list[ops.PolicyStats], Passes]:
        with counted_passes(model.model) as passes:
            return *learn(tokens), passes

    def learn(tokens: int) -> tuple[float, int, list[Tensor], list[ops.PolicyStats]]:
        loss_sum, computed_tokens, gaps, ratios = 0.0, 0, [], []
        step = lay_out(layout, model.model, groups, tokens, pad_id=pad_id)
        for part in step.parts:
            rows = [row_of[p][k] for p, k in part.branches]
            computed = step.forward(part)
            logp = token_logprobs(model, computed, temperature=temperature, banned=bool(banned))
            sampled = torch.tensor([lp for b in rows for lp in batch.completions[b].logprobs], device=device)  # [N]
            old = torch.tensor(
                [stale[b] for b in rows for _ in batch.completions[b].token_ids], device=device
            )  # [N] bool
            sampled = sampled.to(logp.dtype)
            counted = denominator
            if released:
                counted = loss_denominator(options.loss, lengths[rows], aggregation=options.aggregation).to(device)
            loss, stats = ops.policy_loss(
                logp,
                batch.advantage[rows].to(device),
                computed.predict.cu_seqlens,
                old_logp=torch.where(old, sampled, logp.detach()) if old.any() else None,
                denominator=counted,
                options=options,
            )
            if released:
                loss = loss * (len(rows) / len(lengths))
            engine.backward(loss, logp=logp)
            step.finish(part, engine.backward)
            computed_tokens += part.tokens
            loss_sum += float(loss.detach())
            gaps.append((logp.detach() - sampled).abs()[~old].float().cpu())
            ratios.append(stats)
        return loss_sum, computed_tokens, gaps, ratios

    error = self_check(engine, layout, model.model, groups, response_states, budget=budget.tokens, pad_id=pad_id)
    ops.bad_values(device)  # what anybody met before is not of this step
    loss_sum, computed_tokens, gaps, ratios, passes = budget.run(
        accumulate, discard=engine.discard, longest=longest_item(layout, groups)
    )
    try:
        engine.verify()
    except NonFiniteError as error:
        bad = ops.bad_values(device)
        if not bad:
            raise
        raise NonFiniteError(
            f"{error}: {bad} response tokens lie outside the {model.lm_head.out_features} rows of the output "
            "matrix; do tokenizer and model belong together?"
        ) from None
    active = sum(contributes)
    gap = torch.cat(gaps) if gaps else torch.empty(0)
    return {
        "policy/loss": loss_sum,
        "policy/rows": active,
        "policy/tokens": computed_tokens,
        "policy/lr": engine.lr() if active else None,
        "policy/grad_norm": engine.step() if active else None,
        "policy/token_budget": budget.change(),
        "policy/packing_error": error,
        "policy/bad_values": ops.bad_values(device),
        **passes.numbers("policy"),
        "rollout/logprob_gap_mean": float(gap.mean()) if len(gap) else None,
        "rollout/logprob_gap_max": float(gap.max()) if len(gap) else None,
        **(_ratio_metrics(ratios) if any(stale[i] and contributes[i] for i in range(len(stale))) else {}),
    }


def _ratio_metrics(parts: Sequence[ops.PolicyStats]) -> dict[str, float]:
    """How far the stale rows have drifted and how much the clip range holds back, over all computed tokens."""
    tokens = sum(float(part.tokens) for part in parts)

    def mean(name: str) -> float:
        return sum(float(getattr(part, name)) * float(part.tokens) for part in parts) / tokens

    return {
        "policy/clip_fraction": mean("clip_fraction_low") + mean("clip_fraction_high"),
        "policy/approx_kl": mean("approx_kl"),
        "policy/ratio_max": max(float(part.ratio_max) for part in parts),
    }


def response_metrics(completions: Sequence[Completion]) -> dict[str, float | int]:
    """Lengths, entropy and the share of responses cut at the limit, over all of a step's rollouts."""
    lengths = [len(c.token_ids) for c in completions]
    tokens = sum(lengths)
    return {
        "response_length/mean": tokens / len(lengths),
        "response_length/max": max(lengths),
        "response_length/clip_ratio": sum(c.finish == "length" for c in completions) / len(completions),
        "policy/entropy": sum(c.entropy * n for c, n in zip(completions, lengths, strict=True)) / tokens,
    }
