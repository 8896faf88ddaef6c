"""One policy update: response rows only, any number of micro-batches, rows of earlier weights by importance ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.algorithms.presets import PolicyLossOptions
from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.processor import EncodedPrompt
from prism_fast.rollout.protocol import Completion
from prism_fast.train.engine import LocalEngine, NonFiniteError, refuse_non_finite
from prism_fast.train.microbatch import TokenBudget, by_tokens


@dataclass(frozen=True)
class PolicyBatch:
    """A step's rollouts: row b is ``prompts[prompt_of_row[b]]`` continued by ``completions[b]``."""

    prompts: Sequence[EncodedPrompt]
    prompt_of_row: Sequence[int]
    completions: Sequence[Completion]
    advantage: Tensor  # [B] float32 on the CPU
    stale: Sequence[bool] | None = None  # rows that earlier weights sampled; None: the weights of now sampled all


def token_logprobs(model, batch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the continuation tokens of a batch, by the model's :class:`LogProbHead`: no other row reaches it.

    Returns:
        ``logp`` [N] float32 with gradient, and ``cu_seqlens`` [B+1] int32, the continuations' offsets.
    """
    rows = response_rows(batch)
    hidden = hidden_states(model.model, batch)  # [B, S, H]
    hidden = hidden.flatten(0, 1).index_select(0, rows.index)  # [N, H]
    result = model.lm_head(hidden, rows.target, temperature=temperature)
    return result.logp, rows.cu_seqlens


def update_policy(
    engine: LocalEngine,
    batch: PolicyBatch,
    options: PolicyLossOptions,
    *,
    temperature: float,
    pad_id: int,
    budget: TokenBudget,
    device: torch.device,
) -> dict[str, float | int | None]:
    """One optimizer step on the batch. No old-log-prob and no reference pass.

    The ratio of a fresh row is 1 by construction. A stale row is weighed against the log-probs it was sampled with,
    inside the loss's clip range: taken as fresh, its gradient would be that of another policy's samples.
    Rows with advantage exactly 0 have a gradient of exactly 0 and are not computed; they count in the denominator.

    Raises:
        NonFiniteError: an advantage, a log-prob, the loss or the gradient is NaN or infinite, or a token lies outside
            the vocabulary; nothing was updated.
        StepTooLargeError: the longest row alone does not fit into memory.
    """
    refuse_non_finite(engine.where, advantage=batch.advantage)
    model = engine.model
    lengths = torch.tensor([len(c.token_ids) for c in batch.completions])
    denominator = loss_denominator(options.loss, lengths, aggregation=options.aggregation).to(device)
    contributes = (batch.advantage != 0).tolist()
    total = [
        (len(batch.prompts[p].input_ids) + len(c.token_ids)) if active else 0
        for p, c, active in zip(batch.prompt_of_row, batch.completions, contributes, strict=True)
    ]
    stale = [False] * len(batch.completions) if batch.stale is None else list(batch.stale)
    model.train()

    def accumulate(tokens: int) -> tuple[float, list[Tensor], list[ops.PolicyStats]]:
        loss_sum, gaps, ratios = 0.0, [], []
        for part in by_tokens(total, tokens):
            micro = collate(
                batch.prompts,
                [batch.prompt_of_row[i] for i in part],
                [batch.completions[i].token_ids for i in part],
                model_config=model.config,
                pad_id=pad_id,
            ).to(device)
            logp, cu_seqlens = token_logprobs(model, micro, temperature=temperature)
            sampled = torch.tensor([lp for i in part for lp in batch.completions[i].logprobs], device=device)  # [N]
            old = torch.tensor(
                [stale[i] for i in part for _ in batch.completions[i].token_ids], device=device
            )  # [N] bool
            sampled = sampled.to(logp.dtype)
            loss, stats = ops.policy_loss(
                logp,
                batch.advantage[part].to(device),
                cu_seqlens,
                old_logp=torch.where(old, sampled, logp.detach()) if old.any() else None,
                denominator=denominator,
                **options.kwargs(),
            )
            try:
                engine.backward(loss, logp=logp)
            except NonFiniteError as error:
                bad = ops.bad_values(device)
                if not bad:
                    raise
                rows = model.lm_head.out_features
                raise NonFiniteError(
                    f"{error}: {bad} response tokens lie outside the {rows} rows of the output matrix; do tokenizer "
                    f"and model belong together?"
                ) from None
            loss_sum += float(loss.detach())
            gaps.append((logp.detach() - sampled).abs()[~old].float().cpu())
            ratios.append(stats)
        return loss_sum, gaps, ratios

    ops.bad_values(device)  # what anybody met before is not of this step
    loss_sum, gaps, ratios = budget.run(accumulate, discard=engine.discard, longest=max(total, default=1))
    active = sum(contributes)
    gap = torch.cat(gaps) if gaps else torch.empty(0)
    return {
        "policy/loss": loss_sum,
        "policy/rows": active,
        "policy/tokens": sum(total),
        "policy/lr": engine.lr() if active else None,
        "policy/grad_norm": engine.step() if active else None,
        "policy/token_budget": budget.change(),
        "policy/bad_values": ops.bad_values(device),
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
