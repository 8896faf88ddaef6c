"""One policy update: on-policy, response rows only, any number of micro-batches."""

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
from prism_fast.train.engine import LocalEngine
from prism_fast.train.microbatch import by_tokens


@dataclass(frozen=True)
class PolicyBatch:
    """A step's rollouts: row b is ``prompts[prompt_of_row[b]]`` continued by ``completions[b]``."""

    prompts: Sequence[EncodedPrompt]
    prompt_of_row: Sequence[int]
    completions: Sequence[Completion]
    advantage: Tensor  # [B] float32 on the CPU


def token_logprobs(model, batch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the continuation tokens of a batch.

    Returns:
        ``logp`` [N] float32 with gradient, and ``cu_seqlens`` [B+1] int32, the continuations' offsets.
    """
    rows = response_rows(batch)
    hidden = hidden_states(model.model, batch)  # [B, S, H]
    hidden = hidden.flatten(0, 1).index_select(0, rows.index)  # [N, H]
    result = ops.linear_logprob(hidden, model.lm_head.weight, rows.target, temperature=temperature)
    return result.logp, rows.cu_seqlens


def update_policy(
    engine: LocalEngine,
    batch: PolicyBatch,
    options: PolicyLossOptions,
    *,
    temperature: float,
    pad_id: int,
    tokens_per_micro_batch: int,
    device: torch.device,
) -> dict[str, float | int | None]:
    """One optimizer step on the batch. No old-log-prob and no reference pass: the ratio is 1 by construction.

    Rows with advantage exactly 0 have a gradient of exactly 0 and are not computed; they count in the denominator.
    """
    model = engine.model
    lengths = torch.tensor([len(c.token_ids) for c in batch.completions])
    denominator = loss_denominator(options.loss, lengths, aggregation=options.aggregation).to(device)
    contributes = (batch.advantage != 0).tolist()
    total = [
        (len(batch.prompts[p].input_ids) + len(c.token_ids)) if active else 0
        for p, c, active in zip(batch.prompt_of_row, batch.completions, contributes, strict=True)
    ]
    model.train()
    loss_sum, gaps = 0.0, []
    for part in by_tokens(total, tokens_per_micro_batch):
        micro = collate(
            batch.prompts,
            [batch.prompt_of_row[i] for i in part],
            [batch.completions[i].token_ids for i in part],
            model_config=model.config,
            pad_id=pad_id,
        ).to(device)
        logp, cu_seqlens = token_logprobs(model, micro, temperature=temperature)
        loss, _ = ops.policy_loss(
            logp,
            batch.advantage[part].to(device),
            cu_seqlens,
            denominator=denominator,
            **options.kwargs(),
        )
        engine.backward(loss)
        loss_sum += float(loss.detach())
        sampled = torch.tensor([lp for i in part for lp in batch.completions[i].logprobs])
        gaps.append((logp.detach().float().cpu() - sampled).abs())
    active = sum(contributes)
    gap = torch.cat(gaps) if gaps else None
    return {
        "policy/loss": loss_sum,
        "policy/rows": active,
        "policy/tokens": sum(total),
        "policy/lr": engine.lr() if active else None,
        "policy/grad_norm": engine.step() if active else None,
        "rollout/logprob_gap_mean": float(gap.mean()) if gap is not None else None,
        "rollout/logprob_gap_max": float(gap.max()) if gap is not None else None,
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
