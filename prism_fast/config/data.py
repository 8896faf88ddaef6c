"""Settings of data sets and of checking answers: ``data`` and ``reward``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from prism_fast.config.errors import ConfigError, require
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.entries import check_columns, entries_of

DATA_SETS = ("data.sft", "data.sft_val", "data.align", "data.rlvr", "data.eval", "data.pairs")


@dataclass
class DataConfig:
    """``source: digits`` writes the built-in data first; ``source: files`` reads yours. Each key is a file, a folder, a
    glob, a hub name, a list of these, or ``{path, weight, split, name, columns, image_root}`` (data/entries.py)."""

    source: Literal["digits", "files"] = "files"
    sft: Any = None  # demonstrations
    sft_val: Any = None  # demonstrations; none: a part of sft
    align: Any = None  # tasks with teacher texts
    rlvr: Any = None  # tasks
    eval: Any = None  # tasks
    pairs: Any = None  # of a teacher and a student; none: the policy samples its own
    validation_split: float = 0.05  # of data.sft, where data.sft_val is not given; an image is never on both sides
    columns: dict[str, str] = field(default_factory=dict)  # our name of a field: its name in the files
    image_root: str | None = None  # where relative image paths begin; none: at their file
    # For rows without a system turn. published: the one that asks for caption, think and answer; or a text, or a file
    # (.txt, .md). none: nothing is added (pairs: the published one).
    system_prompt: str | None = None
    max_image_pixels: int = 16_777_216  # a larger image is refused before it is decoded
    # Images are resized to at least and at most so many pixels, as the model's image processor does; none: its own
    # limits. 1,024 pixels are one token of Qwen3-VL. Exported models keep the limits they were trained with.
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_prompt_tokens: int | None = None  # a longer prompt (image tokens counted) is a bad sample; none: no limit
    # raise: name file, row and field and stop. skip: leave it out and count it under its reason in the metrics. With
    # skip or a token limit every image is decoded once when a stage starts.
    on_bad_sample: Literal["raise", "skip"] = "raise"
    digits: DigitsSpec = field(default_factory=DigitsSpec)  # sizes of the built-in dataset

    def __post_init__(self) -> None:
        try:
            for key in DATA_SETS:
                if (value := getattr(self, key.removeprefix("data."))) is not None:
                    entries_of(value, key, weights=key in ("data.sft", "data.align", "data.rlvr"))
            check_columns(self.columns, "data.columns")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        require(0 < self.validation_split < 1, "data.validation_split", "between 0 and 1", self.validation_split)
        if self.min_pixels is not None and self.max_pixels is not None:
            allowed = f"at most data.max_pixels = {self.max_pixels}"
            require(self.min_pixels <= self.max_pixels, "data.min_pixels", allowed, self.min_pixels)


@dataclass
class JudgeConfig:
    """A language model behind an OpenAI-compatible chat API. It grades the data sources that need one (mm_gad_llm),
    where the rules find no agreement. Off without a ``url``."""

    url: str | None = None  # base of the API, e.g. http://localhost:8000/v1
    model: str | None = None  # its name there
    api_key_env: str | None = None  # environment variable that holds the key; none: no key is sent
    timeout_s: float = 30.0  # of one try, answer included
    attempts: int = 3  # tries of one question; one without an answer is counted as reward/judge_errors
    concurrency: int = 8  # questions asked at the same time

    def __post_init__(self) -> None:
        allowed = "an http:// or https:// address, or null for no judge"
        is_address = self.url is not None and self.url.startswith(("http://", "https://"))
        require(self.url is None or is_address, "reward.judge.url", allowed, self.url)
        require(self.url is None or bool(self.model), "reward.judge.model", "given with reward.judge.url", self.model)


@dataclass
class RewardConfig:
    """Checking answers. Formulas are compared in worker processes that the kernel ends at their limits."""

    workers: int = 1
    timeout_s: float = 5.0  # CPU seconds of one comparison, and three times as many on the clock
    memory_mb: int = 1024  # address space of a worker
    max_answer_chars: int = 1024  # a longer answer is not right
    # Reward functions of your own, `data_source: package.module:function`; they grade the rows of that data_source.
    functions: dict[str, str] = field(default_factory=dict)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        require(self.memory_mb >= 256, "reward.memory_mb", "256 or more", self.memory_mb)
