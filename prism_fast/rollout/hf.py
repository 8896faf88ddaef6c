"""The embedded rollout engine: transformers' own modules with a KV cache, on any device.

The prompt of a group is computed once and its cache repeated for the group's responses. Prompts of different length
share a batch: their cache is right-padded, the gap masked, every row continues at its own M-RoPE position. Rows that
have ended leave the batch, so a long tail costs what it is long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from prism_fast.models.forward import collate, language_outputs
from prism_fast.models.processor import EncodedPrompt, Processor
from prism_fast.rollout.protocol import Completion, Sampling

COMPACT_BELOW = 0.75  # share of unfinished rows below which finished ones leave the batch


class HFRollout:
    """Samples from ``model`` (a ``Qwen3VLForConditionalGeneration``) with its current weights."""

    def __init__(self, model, processor: Processor):
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        seed: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`prism_fast.rollout.protocol.Rollout`."""
        if not prompts:
            return []
        was_training = self.model.training
        self.model.eval()
        try:
            rows = self._decode(prompts, sampling, seed, on_token)
        finally:
            self.model.train(was_training)
        return [rows[i * sampling.n : (i + 1) * sampling.n] for i in range(len(prompts))]

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        seed: int,
        on_token: Callable[[int], None] | None,
    ) -> list[Completion]:
        model, n, limit = self.model, sampling.n, sampling.max_new_tokens
        device = model.device
        generator = torch.Generator(device=device).manual_seed(seed)
        batch = collate(
            prompts,
            range(len(prompts)),
            [()] * len(prompts),
            model_config=model.config,
            pad_id=self.processor.pad_id,
        ).to(device)
        cache = DynamicCache(config=model.config.text_config)
        hidden = language_outputs(model.model, batch, past_key_values=cache).last_hidden_state  # [P, S, H]
        last = hidden[torch.arange(len(prompts), device=device), batch.lengths - 1]  # [P, H]
        cache.batch_repeat_interleave(n)
        last = last.repeat_interleave(n, dim=0)  # [B, H]
        mask = batch.attention_mask.repeat_interleave(n, dim=0)  # [B, S]
        next_position = (batch.position_ids.amax(dim=(0, 2)) + 1).repeat_interleave(n)  # [B]

        total = len(prompts) * n
        tokens = torch.full((total, limit), self.processor.pad_id, device=device)
        logprobs = torch.zeros(total, limit, device=device)
        entropies = torch.zeros(total, limit, device=device)
        lengths = torch.zeros(total, dtype=torch.int64, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        rows = torch.arange(total, device=device)  # which response each row of the batch is
        for t in range(limit):
            token, logprob, entropy = self._sample(last, sampling.temperature, generator)
            live = ~finished[rows]
            at = rows[live]
            tokens[at, t], logprobs[at, t], entropies[at, t] = token[live], logprob[live], entropy[live]
            lengths[at] = t + 1
            finished[at] = token[live] == self.processor.eos_id
            growing = int((~finished).sum())
            if on_token is not None:
                on_token(growing)
            if growing == 0 or t + 1 == limit:
                break
            if growing < COMPACT_BELOW * len(rows):
                keep = (~finished[rows]).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, mask, next_position, token = rows[keep], mask[keep], next_position[keep], token[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            last = model.model.language_model(
                input_ids=token[:, None],
                position_ids=(next_position + t).expand(3, -1)[:, :, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]  # [B, H]
        return self._completions(tokens, logprobs, entropies, lengths, finished)

    def _sample(self, hidden: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one token per row; returns ids, their log-probs and the sampled distribution's entropy, each [B]."""
        logits = self.model.lm_head(hidden).float()  # [B, V]
        logits[:, list(self.processor.banned_ids)] = -torch.inf
        if temperature > 0:
            logits = logits / temperature
        log_softmax = torch.log_softmax(logits, dim=-1)
        probs = log_softmax.exp()
        if temperature > 0:
            token = torch.multinomial(probs, 1, generator=generator)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
        return token.squeeze(1), log_softmax.gather(1, token).squeeze(1), entropy

    @staticmethod
    def _completions(
        tokens: Tensor, logprobs: Tensor, entropies: Tensor, lengths: Tensor, finished: Tensor
    ) -> list[Completion]:
        counts = lengths.tolist()
        mean_entropy = (entropies.sum(dim=1) / lengths).tolist()
        return [
            Completion(tuple(ids[:k]), tuple(lps[:k]), h, "stop" if stopped else "length")
            for ids, lps, k, h, stopped in zip(
                tokens.tolist(), logprobs.tolist(), counts, mean_entropy, finished.tolist(), strict=True
            )
        ]
