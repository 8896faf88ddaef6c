"""One policy update: response rows only, any number of micro-batches, rows of earlier weights by importance ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from prism_fast import ops
from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.engine.finite import NonFiniteError, refuse_non_finite
from prism_fast.engine.local import LocalEngine
from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import EncodedPrompt
from prism_fast.models.transfer import moved
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.protocol import Completion
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
    model = engine.module
    lengths = torch.tensor([len(c.token_ids) for c in batch.completions])
    denominator = moved(loss_denominator(options.loss, lengths, aggregation=options.aggregation), device)
    contributes = ((batch.advantage != 0) | released).tolist()
    groups, row_of = batch.groups(contributes)
    stale = [False] * len(batch.completions) if batch.stale is None else list(batch.stale)
    model.train()
    if banned:
        model.lm_head.ban(banned)

    def attempt(tokens: int) -> tuple[_Seen, Passes]:
        with counted_passes(model.model) as passes:
            return learn(tokens), passes

    def learn(tokens: int) -> _Seen:
        seen = _Seen([], [], [])
        step = lay_out(layout, model.model, groups, tokens, pad_id=pad_id)
        for part in step.parts:
            rows = [row_of[p][k] for p, k in part.branches]
            computed = step.forward(part)
            counted = denominator
            if released:
                own = loss_denominator(options.loss, lengths[rows], aggregation=options.aggregation)
                counted = moved(own, device)
            losses, logps = [], []
            for share, old in (([b for b in rows if not stale[b]], False), ([b for b in rows if stale[b]], True)):
                if not share:
                    continue
                hidden, target, cu_seqlens = _rows_of(computed, lengths[rows].tolist(), [rows.index(b) for b in share])
                sampled = moved(torch.tensor([x for b in share for x in batch.completions[b].logprobs]), device)  # [N]
                loss, stats, logp = model.lm_head.policy_loss(
                    hidden,
                    target,
                    moved(batch.advantage[share], device),
                    cu_seqlens,
                    options=options,
                    old_logp=sampled if old else None,
                    denominator=counted,
                    temperature=temperature,
                    banned=bool(banned),
                    borders=_offsets(lengths[share].tolist()) if old else None,
                )
                losses.append(loss)
                logps.append(logp)
                seen.stats.append(stats)
                if not old:
                    seen.gaps.append((logp - sampled).abs())
            loss = torch.stack(losses).sum()
            if released:
                loss = loss * (len(rows) / len(lengths))
            engine.backward(loss, logp=torch.cat(logps))
            step.finish(part, engine.backward)
            seen.losses.append(loss.detach())
            seen.tokens += part.tokens
        return seen

    error = self_check(engine, layout, model.model, groups, response_states, budget=budget.tokens, pad_id=pad_id)
    ops.bad_values(device)  # what anybody met before is not of this step
    seen, passes = budget.run(attempt, discard=engine.discard, longest=longest_item(layout, groups))
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
    return {
        "policy/rows": active,
        "policy/tokens": seen.tokens,
        "policy/lr": engine.lr() if active else None,
        "policy/grad_norm": engine.step().grad_norm if active else None,
        "policy/token_budget": budget.change(),
        "policy/packing_error": error,
        "policy/bad_values": ops.bad_values(device),
        **passes.numbers("policy"),
        **seen.numbers(ratios=any(s and c for s, c in zip(stale, contributes, strict=True))),
    }


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _rows_of(computed: Forward, lengths: Sequence[int], chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a forward's continuations, ``lengths`` tokens each, the ``chosen`` ones: hidden states [N, H] that predict
    their tokens, the tokens [N] and offsets [B+1] int32."""
    predict = computed.predict
    if len(chosen) == len(lengths):
        return computed.hidden.index_select(0, predict.index), predict.target, predict.cu_seqlens
    starts = _offsets(lengths)
    places = moved(torch.tensor([i for k in chosen for i in range(starts[k], starts[k + 1])]), predict.index.device)
    cu_seqlens = torch.tensor(_offsets([lengths[k] for k in chosen]), dtype=torch.int32)
    hidden = computed.hidden.index_select(0, predict.index[places])
    return hidden, predict.target[places], moved(cu_seqlens, predict.index.device)


@dataclass
class _Seen:
    """Of a step's micro-batches, on the device until `numbers` reads them in one transfer."""

    losses: list[Tensor]  # [] each
    gaps: list[Tensor]  # per fresh share of a micro-batch [N]: |log-prob in the update - log-prob in the rollout|
    stats: list[ops.PolicyStats]
    tokens: int = 0

    def numbers(self, *, ratios: bool) -> dict[str, float | None]:
        """The loss, the rollout's gap and, with ``ratios``, how far stale rows have drifted and how much the clip range
        holds back, over all computed tokens. What has no token has no number."""
        found = {"policy/loss": torch.stack(self.losses).double().sum()} if self.losses else {}
        if self.gaps:
            gap = torch.cat(self.gaps).float()
            found |= {"rollout/logprob_gap_mean": gap.mean(), "rollout/logprob_gap_max": gap.max()}
        if ratios:
            merged = ops.PolicyStats(*(torch.stack(part).double() for part in zip(*self.stats, strict=True)))
            share = merged.tokens / merged.tokens.sum()
            found["policy/clip_fraction"] = ((merged.clip_fraction_low + merged.clip_fraction_high) * share).sum()
            found["policy/approx_kl"] = (merged.approx_kl * share).sum()
            found["policy/ratio_max"] = merged.ratio_max.max()
        values = torch.stack([value.double() for value in found.values()]).tolist() if found else []
        missing = {"policy/loss": 0.0, "rollout/logprob_gap_mean": None, "rollout/logprob_gap_max": None}
        return missing | dict(zip(found, values, strict=True))


def response_metrics(completions: Sequence[Completion]) -> dict[str, float | int]:
    """Lengths, the share of responses cut at the limit and, from an engine that sees it, the mean entropy of a token,
    over all of a step's rollouts."""
    lengths = [len(c.token_ids) for c in completions]
    tokens = sum(lengths)
    entropies = [c.entropy * n for c, n in zip(completions, lengths, strict=True) if c.entropy is not None]
    entropy = {"policy/entropy": sum(entropies) / tokens} if len(entropies) == len(completions) else {}
    return {
        "response_length/mean": tokens / len(lengths),
        "response_length/max": max(lengths),
        "response_length/clip_ratio": sum(c.finish_reason == "length" for c in completions) / len(completions),
        **entropy,
    }
