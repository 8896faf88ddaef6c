"""The contract of rollout engines. `tests/contracts/rollout.py` checks whether an engine keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from prism_fast.models.processor import Processor, Prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. ``temperature=0`` is greedy decoding. After bans and temperature, ``top_k`` leaves so
    many of the likeliest tokens (0: all), then ``top_p`` the likeliest that together reach this probability (1: all).
    """

    n: int
    temperature: float
    max_new_tokens: int
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be 1 or more, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"greedy decoding gives the same response {self.n} times; use n=1 or a temperature above 0"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need top_k of 0 or more and top_p in (0, 1], got {self.top_k} and {self.top_p}")
        if self.temperature == 0 and self.truncates:
            raise ValueError("greedy decoding takes the likeliest token: leave top_k and top_p out, or set temperature")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: sampled ids, the end token included when one was sampled.
        logprobs: one per id, natural log, under the distribution that was sampled from: scores of banned ids set to
            -inf, then all divided by the temperature (by 1 in greedy decoding), then those of tokens that ``top_k`` and
            ``top_p`` leave out set to -inf.
        entropy: mean entropy of that distribution over the response's tokens, in nats; None from an engine that does
            not see whole distributions.
        finish_reason: ``stop`` (an end token was sampled) or ``length`` (``max_new_tokens`` reached).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: float | None
    finish_reason: Literal["stop", "length"]


class Rollout(Protocol):
    """A rollout engine: one object for the life of a run, which samples for training, pairs and evaluation alike.

    Rules for all engines: a response continues the ids of its prompt, nothing is tokenised again; the first id of
    `end_ids` ends a response and belongs to it; `Processor.banned_ids` are never sampled.

    Attributes:
        streams: whether groups are handed to ``finished`` while others are still generated.
    """

    streams: bool

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        poll: Callable[[], None],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """``sampling.n`` completions for each prompt, in the order of the prompts.

        Args:
            seeds: one per prompt, 0 or more and below 2**64. The random numbers of a response depend only on its
                prompt's seed, its number among the n and the token's position, not on the other responses.
            poll: called at least once per decoding step. It may raise: the call ends, the engine stays usable.
            finished: called once for each prompt, with its place and its completions, in any order.

        Raises:
            ValueError: another number of seeds than of prompts, or the engine is closed.
            FloatingPointError: the policy's scores are not finite.
        """
        ...

    def attach(self, policy: nn.Module, processor: Processor) -> None:
        """Sample from ``policy`` from now on; each stage of a run attaches its own."""
        ...

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's new weights: (name, whole tensor), from the training engine's ``named_weights``."""
        ...

    def sleep(self) -> None:
        """Free memory until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready for `sync` and `generate` again."""
        ...

    def close(self) -> None:
        """Free everything; may be called twice."""
        ...


def check_seeds(prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
    """Raise ValueError unless there is one seed per prompt."""
    if len(seeds) != len(prompts):
        raise ValueError(f"need one seed per prompt, got {len(seeds)} for {len(prompts)} prompts")


def end_ids(policy: nn.Module, processor: Processor) -> tuple[int, ...]:
    """The ids that end a response: every one of the policy's ``generation_config.eos_token_id``, ascending, as in
    transformers' ``generate`` and in vLLM.

    Raises:
        ValueError: there is none, or the end-of-turn token that SFT teaches is not among them.
    """
    eos = policy.generation_config.eos_token_id
    ids = sorted({eos} if isinstance(eos, int) else set(eos or ()))
    if processor.eos_id not in ids:
        raise ValueError(
            f"the policy's generation_config.eos_token_id is {eos}, but it must hold {processor.eos_id} "
            "(<|im_end|>), with which SFT ends every response: add it to generation_config.json in the policy's folder"
        )
    return tuple(ids)
