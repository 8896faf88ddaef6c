"""Selects the usable samples of a file: images that decode, prompts that fit. For training and ``data check``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from prism_fast.data.problems import DataError, LongPromptError, Place
from prism_fast.data.samples import Samples, T
from prism_fast.models.processor import Processor

REASONS = ("bad", "image", "long")
TEXTS = ("response", *(f"{side}_{text}" for text in ("caption", "cot", "response") for side in ("teacher", "student")))
"""Fields of samples that hold texts to learn from or to score."""


@dataclass(frozen=True)
class Screened(Generic[T]):
    """The usable ``samples``, the ``problems`` of the others (those of reading included), and the lengths of all
    prompts that could be measured, too long ones too; no lengths without a processor.

    ``text_tokens``, only of a whole encoding: lengths of the texts that a stage learns from or scores, by field."""

    samples: Samples[T]
    problems: list[DataError]
    prompt_tokens: list[int]
    text_tokens: dict[str, list[int]]

    def counts(self) -> dict[str, int]:
        """``kept`` samples, and those left out under each of `REASONS` (``skipped_…``)."""
        skipped = [problem.reason for problem in self.problems]
        return {"kept": len(self.samples)} | {f"skipped_{reason}": skipped.count(reason) for reason in REASONS}


def screen(
    samples: Samples[T],
    *,
    processor: Processor | None = None,
    max_prompt_tokens: int | None = None,
    problems: list[DataError] | None = None,
    each: Callable[[], None] = lambda: None,
    encode: bool = False,
) -> Screened[T]:
    """Decode the images of every sample once and, with a ``processor``, measure its prompt with image tokens expanded;
    with ``encode`` make its pixels and the tokens of its texts too, as training will.

    Prompts longer than ``max_prompt_tokens`` are problems; none is truncated, which would separate image tokens from
    their images. Without a ``problems`` list the first problem is raised; with one (which may hold those of reading)
    problems are appended and their samples left out. ``each`` is called before every sample and may raise to stop.
    """
    if max_prompt_tokens is not None and processor is None:
        raise ValueError("max_prompt_tokens needs a processor: tokens are those of a particular policy")
    kept: list[int] = []
    lengths: list[int] = []
    texts: dict[str, list[int]] = {}
    for index in range(len(samples)):
        each()
        try:
            sample = samples[index]
            if processor is not None:
                place = samples.place(index)
                place = Place(place.file, f"{place.row}, sample {sample.uid}")
                lengths.append(_prompt_tokens(sample, place, processor, encode))
                _check_length(lengths[-1], max_prompt_tokens, place)
                for field in TEXTS if encode else ():
                    if (text := getattr(sample, field, None)) is not None:
                        texts.setdefault(field, []).append(len(processor.encode_plain(text)))
            kept.append(index)
        except DataError as error:
            if problems is None:
                raise
            problems.append(error)
    return Screened(samples.take(kept), [] if problems is None else problems, lengths, texts)


def _prompt_tokens(sample: T, place: Place, processor: Processor, encode: bool) -> int:
    try:
        if encode:
            return len(processor.encode_prompt(sample.messages, sample.images).input_ids)
        return processor.prompt_tokens(sample.messages, sample.images)
    except ValueError as error:
        raise place.error("prompt", f"cannot be encoded: {error}", "Mend or leave out the sample") from error


def _check_length(tokens: int, limit: int | None, place: Place) -> None:
    if limit is not None and tokens > limit:
        wrong = f"expands to {tokens} tokens, more than the limit of {limit}"
        cure = "Shorten the prompt, shrink its images, or raise the limit"
        raise place.error("prompt", wrong, cure, kind=LongPromptError)
