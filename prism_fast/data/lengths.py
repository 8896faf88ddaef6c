"""The published length handling of token rows: pad or cut prompts and teacher texts, mask responses at their end token.

prism-fast itself carries explicit lengths and needs neither; they are what ``released`` semantics and data from
trainers with padded tensors are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

TRUNCATIONS = ("right", "left", "middle", "error")


def fit_length(
    ids: Sequence[int], max_length: int, *, pad_id: int, left_pad: bool, truncation: str
) -> tuple[list[int], list[int]]:
    """(ids, attention mask), both of ``max_length``: padded on one side, or cut.

    ``truncation`` names the side that is lost: ``right``, ``left``, ``middle`` (the first half, rounded down, and the
    end stay), or ``error``: ValueError when the row is too long.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation {truncation!r} is not known; allowed: {', '.join(TRUNCATIONS)}")
    if max_length < 1:
        raise ValueError(f"max_length = {max_length}: must be at least 1")
    kept = list(ids)
    if len(kept) > max_length:
        if truncation == "error":
            raise ValueError(f"{len(kept)} tokens exceed max_length = {max_length}: shorten the text or raise it")
        head = {"right": max_length, "left": 0, "middle": max_length // 2}[truncation]
        tail = max_length - head
        kept = kept[:head] + kept[len(kept) - tail :]
    padding = max_length - len(kept)
    pads, ones = [pad_id] * padding, [1] * len(kept)
    return (pads + kept, [0] * padding + ones) if left_pad else (kept + pads, ones + [0] * padding)


def response_mask(response: Sequence[int], eos_ids: int | Sequence[int]) -> list[int]:
    """1 up to and including the first end token (any of ``eos_ids``), 0 behind it; all 1 when there is none.

    With the pad id among the end tokens, as Qwen3-VL's generation configuration has it, a cut response gains its first
    pad token: a reason to carry lengths instead.
    """
    ends = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids)
    length = next((place + 1 for place, index in enumerate(response) if index in ends), len(response))
    return [1] * length + [0] * (len(response) - length)
