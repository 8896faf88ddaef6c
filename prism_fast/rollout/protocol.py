"""What every rollout engine takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_fast.models.processor import EncodedPrompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. ``temperature=0`` is greedy decoding."""

    n: int
    temperature: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be 1 or more, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"greedy decoding gives the same response {self.n} times; use n=1 or a temperature above 0"
            )


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: sampled ids, the end token included when it was sampled.
        logprobs: one per id, natural log, under the distribution that was sampled from (temperature and ban applied).
        entropy: mean entropy of that distribution over the response's tokens, in nats.
        finish: ``stop`` (the end token was sampled) or ``length`` (``max_new_tokens`` reached).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: float
    finish: str


class Rollout(Protocol):
    """An engine. The ids it samples from are those of the prompts it is given: nothing is tokenised again."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        seed: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """``sampling.n`` completions for each prompt, in the order of the prompts.

        The same prompts, sampling and seed on the same machine give the same ids. ``on_token(k)`` is called after each
        decoding step with the number of responses still growing. Vision tokens are never sampled.
        """
        ...
