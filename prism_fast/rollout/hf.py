"""The embedded rollout engine: transformers' own modules with a KV cache, on any device.

Responses are generated in chunks of a token budget. A chunk computes each of its prompts once and repeats the cache for
the prompt's responses. Prompts of different length share a chunk: their cache is right-padded, the gap masked, every
row continues at its own M-RoPE position. Finished rows leave the batch, so a few long responses keep few rows busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prism_fast.models.family import trunk
from prism_fast.models.forward import collate, language_outputs
from prism_fast.models.processor import Processor, Prompt
from prism_fast.models.token_budget import TokenBudget, by_tokens
from prism_fast.rollout.protocol import Completion, Sampling, check_seeds, end_ids
from prism_fast.rollout.sampling import draw, response_key, truncated, uniform

COMPACT_BELOW = 0.75  # share of unfinished rows below which finished ones leave the batch
LOWEST = torch.finfo(torch.float32).min  # of log-probs in a product with their probability: 0 times -inf is NaN
SCORES_AT_ONCE = 1 << 24  # logits that exist at once while tokens are drawn


class HFRollout:
    """Samples from the trainer's own module (a ``Qwen3VLForConditionalGeneration``); see `protocol.Rollout`.

    The trainer's own module needs no `sync`; a copy of it (where the trainer's weights are sharded) gets them there.
    `sleep` frees nothing.
    """

    streams = False

    def __init__(self, policy: nn.Module, processor: Processor, budget: TokenBudget):
        """``budget``: tokens in the KV cache at once, a prompt counted for each of its responses, each response at its
        full length; a response that is longer is generated alone. Halved where memory runs out."""
        self._budget = budget
        self.attach(policy, processor)

    def attach(self, policy: nn.Module, processor: Processor) -> None:
        self._policy: nn.Module | None = policy
        self._processor = processor
        self._ends = end_ids(policy, processor)

    @torch.no_grad()
    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into a module that learns nothing itself; one that is trained has them already."""
        own = dict(self._policy.named_parameters())
        if not any(parameter.requires_grad for parameter in own.values()):
            for name, weight in weights:
                own[name].copy_(weight)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        self._policy = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        poll: Callable[[], None],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `protocol.Rollout`.

        Raises:
            StepTooLargeError: memory does not hold the longest response alone.
        """
        if self._policy is None:
            raise ValueError("this rollout engine is closed: make another")
        check_seeds(prompts, seeds)
        if not prompts:
            return []
        n = sampling.n
        tokens_of = [len(prompt.input_ids) + sampling.max_new_tokens for prompt in prompts for _ in range(n)]
        completions: list[Completion | None] = [None] * len(tokens_of)

        def attempt(budget: int) -> None:
            waiting = [i for i, completion in enumerate(completions) if completion is None]
            for chunk in by_tokens([tokens_of[i] for i in waiting], budget):
                responses = [waiting[k] for k in chunk]
                keys = [response_key(seeds[i // n], i % n) for i in responses]
                made = self._decode(prompts, [i // n for i in responses], keys, sampling, poll)
                for i, completion in zip(responses, made, strict=True):
                    completions[i] = completion

        was_training = self._policy.training
        self._policy.eval()
        try:
            self._budget.run(attempt, discard=lambda: None, longest=max(tokens_of))
        finally:
            self._policy.train(was_training)
        groups = [completions[p * n : (p + 1) * n] for p in range(len(prompts))]
        for place, group in enumerate(groups if finished is not None else ()):
            finished(place, group)
        return groups

    def _decode(
        self,
        prompts: Sequence[Prompt],
        prompt_of_row: Sequence[int],
        keys: Sequence[int],
        sampling: Sampling,
        poll: Callable[[], None],
    ) -> list[Completion]:
        """One response per row b: to prompt ``prompt_of_row[b]``, with the random numbers of ``keys[b]``."""
        model, limit, total = self._policy, sampling.max_new_tokens, len(keys)
        device = model.device
        used = list(dict.fromkeys(prompt_of_row))
        batch = collate(prompts, used, [()] * len(used), model_config=model.config, pad_id=self._processor.pad_id).to(
            device
        )
        cache = DynamicCache(config=model.config.text_config)
        hidden = language_outputs(model.model, batch, past_key_values=cache).last_hidden_state  # [P, S, H]
        last = hidden[torch.arange(len(used), device=device), batch.lengths - 1]  # [P, H]
        place = {p: k for k, p in enumerate(used)}
        repeated = torch.tensor([place[p] for p in prompt_of_row], device=device)  # [B]
        cache.batch_select_indices(repeated)
        last, mask = last[repeated], batch.attention_mask[repeated]  # [B, H], [B, S]
        next_position = (batch.position_ids.amax(dim=(0, 2)) + 1)[repeated]  # [B]

        tokens = torch.full((total, limit), self._processor.pad_id, device=device)
        logprobs = torch.zeros(total, limit, device=device)
        entropy = torch.zeros(total, device=device)  # summed over a response
        lengths = torch.zeros(total, dtype=torch.int64, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        rows = torch.arange(total, device=device)  # the response of each row of the batch
        keys_of_row, ends = torch.tensor(keys, device=device), torch.tensor(self._ends, device=device)
        for t in range(limit):
            token, logprob, token_entropy = self._sample(last, sampling, uniform(keys_of_row, t))
            growing = ~finished[rows]
            tokens[rows, t], logprobs[rows, t] = token, logprob  # of a finished row too: cut at its length below
            entropy[rows] += torch.where(growing, token_entropy, 0.0)
            lengths[rows] += growing
            finished[rows] |= torch.isin(token, ends)
            unfinished, broken = torch.stack([(~finished).sum(), (growing & ~logprob.isfinite()).sum()]).tolist()
            if broken:
                raise FloatingPointError(
                    f"the policy's scores are not finite at token {t} of {broken} response(s): its weights are damaged "
                    "or training has diverged; go back to an earlier checkpoint or lower the learning rate"
                )
            poll()
            if unfinished == 0 or t + 1 == limit:
                break
            if unfinished < COMPACT_BELOW * len(rows):
                keep = (~finished[rows]).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, mask, next_position, token = rows[keep], mask[keep], next_position[keep], token[keep]
                keys_of_row = keys_of_row[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            last = trunk(model)(
                input_ids=token[:, None],
                position_ids=(next_position + t).expand(3, -1)[:, :, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]  # [B, H]
        return [
            Completion(tuple(ids[:k]), tuple(lps[:k]), h / k, "stop" if stopped else "length")
            for ids, lps, k, h, stopped in zip(
                *(column.tolist() for column in (tokens, logprobs, lengths, entropy, finished)), strict=True
            )
        ]

    def _sample(self, hidden: Tensor, sampling: Sampling, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token per row of ``hidden`` [B, H] by the uniform numbers ``at`` [B]; returns ids, their log-probs and
        the sampled distribution's entropy, each [B]."""
        at_once = max(1, SCORES_AT_ONCE // self._policy.config.text_config.vocab_size)
        chunks = zip(hidden.split(at_once), at.split(at_once), strict=True)
        drawn = [self._draw(*chunk, sampling) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*drawn, strict=True))

    def _draw(self, hidden: Tensor, at: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
        scores = self._policy.lm_head(hidden).float()  # [B, V]
        scores[:, list(self._processor.banned_ids)] = -torch.inf
        if sampling.temperature > 0:
            scores = scores / sampling.temperature
        if sampling.truncates:
            scores = truncated(scores, sampling.top_k, sampling.top_p)
        log_softmax = torch.log_softmax(scores, dim=-1)
        probs = log_softmax.exp()
        token = draw(probs, at) if sampling.temperature > 0 else scores.argmax(dim=-1)
        entropy = -(probs * log_softmax.clamp(min=LOWEST)).sum(dim=-1)  # 0 where the probability is 0
        return token, log_softmax.gather(1, token[:, None]).squeeze(1), entropy
