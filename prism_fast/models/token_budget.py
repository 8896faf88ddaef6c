"""Cutting work into pieces by a token budget: a step into micro-batches, generation into chunks of responses. The cut
changes only the memory, never the result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

# Messages of failed allocations that are no torch.OutOfMemoryError: of PyTorch's CPU allocator, of the CUDA runtime
# outside the caching allocator, and of libraries that allocate their own workspaces.
_ALLOCATION_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class StepTooLargeError(RuntimeError):
    """One item alone does not fit into memory: no smaller micro-batch exists."""


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut items into batches of at most ``budget`` padded tokens (items x longest item).

    Items are taken longest first so that padding stays small. An item longer than the budget gets its own batch.

    Returns:
        Lists of item indices; every item is in exactly one. Empty items (length 0) are left out.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be 1 or more, got {budget}")
    order = sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be allocated, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)


class TokenBudget:
    """Tokens per piece: the recipe's number, halved whenever an allocation fails.

    Work that did not fit is repeated in smaller pieces with the same result: the cut of a step does not change its
    gradient (losses are divided by counts of the whole step), and the cut of generation does not change the responses
    (each has its own random numbers).
    """

    def __init__(self, tokens: int, *, notify: Callable[[str], None], piece: str = "micro-batch"):
        """``notify`` gets a message for every reduction; ``piece``: the word for a piece in messages."""
        if tokens < 1:
            raise ValueError(f"the token budget must be 1 or more, got {tokens}")
        self.tokens = tokens
        self._notify, self._piece = notify, piece
        self._reported = tokens

    def run(
        self,
        attempt: Callable[[int], T],
        *,
        discard: Callable[[], None],
        longest: int = 1,
        agree: Callable[[bool], bool] = bool,
    ) -> T:
        """``attempt(tokens)``, repeated with half the tokens as often as memory runs out.

        Args:
            attempt: does the whole work in pieces of so many tokens. After a failure it is called again for all of it
                (a failed backward has left half a gradient), with PyTorch's generators set back.
            discard: drops the remains of a failed attempt, e.g. gradients.
            longest: tokens of the longest item; a smaller budget would not help, as it is alone in its piece.
            agree: whether a flag is true on every rank. All ranks do the work again if memory ran out on one.

        Raises:
            StepTooLargeError: the longest item alone does not fit.
        """
        generators = _generator_states()
        while True:
            result: T | None = None
            failure: str | None = None
            try:
                result = attempt(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = str(error).strip().partition("\n")[0] or type(error).__name__
            # Outside of the handler: the traceback held the failed attempt's tensors.
            if agree(failure is None):
                return result
            result = None
            discard()
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
            reason = "on another rank" if failure is None else failure
            if not agree(failure is None or self.tokens > longest):
                raise StepTooLargeError(
                    f"out of memory with one item per {self._piece} ({longest} tokens, budget {self.tokens}): "
                    f"{reason}. Shorten the items (max_new_tokens, smaller images), use model.dtype=bfloat16, a "
                    "smaller model or more memory; `prism-fast plan` shows what needs how much"
                )
            self.tokens = max(1, self.tokens // 2)
            self._notify(f"out of memory ({reason}): done again with at most {self.tokens} tokens per {self._piece}")
            _set_generator_states(generators)

    def change(self) -> int | None:
        """The current budget if it changed since the last call, else None; for the metrics."""
        changed, self._reported = self.tokens != self._reported, self.tokens
        return self.tokens if changed else None

    def restore(self, tokens: int) -> None:
        """Set the budget of a checkpoint, so that a resumed run cuts like the first one."""
        self.tokens = self._reported = tokens


def _generator_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_generator_states(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
