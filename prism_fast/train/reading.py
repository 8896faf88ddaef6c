"""Reads a run's data files: chooses the reader of each and handles samples that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_fast.config import Config, ConfigError
from prism_fast.data.formats import SOURCES, Wanted, needed_sources, open_file
from prism_fast.data.problems import DataError
from prism_fast.data.readers import PAIR_RESPONSES, PAIR_SPANS, Samples
from prism_fast.data.screen import Screened, screen
from prism_fast.models.processor import Processor
from prism_fast.rewards.routes import known_sources
from prism_fast.train.context import Run


def open_samples(config: Config, name: str, path: Path, problems: list[DataError] | None = None) -> Samples:
    """The samples of ``data.<name>``: every row parsed, no image decoded. Rows that cannot be used go to ``problems``;
    without that list the first is raised (DataError)."""
    wanted = Wanted(
        require_teacher=SOURCES[name].require_teacher,
        known_sources=(*known_sources(judge=config.reward.judge.url is not None), *config.reward.functions),
        pair_texts=PAIR_SPANS if config.align.discriminate == "spans" else PAIR_RESPONSES,
    )
    pixels = config.data.max_image_pixels
    return open_file(path, SOURCES[name].format, wanted, max_image_pixels=pixels, problems=problems)


@dataclass(frozen=True)
class DataFiles:
    """The file of each key of ``SOURCES`` that has one."""

    paths: dict[str, Path]

    @classmethod
    def of(cls, config: Config) -> DataFiles:
        """The files that a configuration names; they need not exist."""
        named = {key: getattr(config.data, key) for key in SOURCES}
        return cls({key: Path(value) for key, value in named.items() if value is not None})

    def need(self, name: str, stage: str) -> Path:
        path = self.paths.get(name)
        if path is None:
            raise ConfigError(f"stage {stage} needs data.{name}=PATH (or data.source=digits)")
        if not path.exists():
            raise ConfigError(f"data.{name}: {path} does not exist")
        return path

    def needed(self, stages: Sequence[str]) -> dict[str, Path]:
        """The files that ``stages`` read, by key. ConfigError names a missing one."""
        return {key: self.need(key, stage) for key, stage in needed_sources(stages, self.paths).items()}


class DataReader:
    """Reads the files of one stage. ``data.on_bad_sample``: a bad sample is an error, or is left out and counted.

    With ``skip`` or ``data.max_prompt_tokens`` every image is decoded once, and omissions are shown on the console and
    logged under the stage ``data``. A run resumed inside the stage does not log them a second time.
    """

    def __init__(self, run: Run, stage: str):
        self._run, self._stage = run, stage

    def read(self, name: str, path: Path, processor: Processor | None, *, tell: bool = True) -> Samples:
        """The usable samples of ``data.<name>``. Without a ``processor`` no length is known and none is limited.

        Raises:
            DataError: the file cannot be read, or it holds a bad sample and these are not to be skipped.
            ConfigError: no sample is left.
        """
        screened = self.screen(name, path, processor)
        if screened is None:
            return open_samples(self._run.config, name, path)
        if not len(screened.samples):
            raise ConfigError(
                f"data.{name}: no usable sample is left of {path}: {_shown(screened)}. "
                f"First problem: {screened.problems[0]}"
            )
        if tell:
            self._tell(name, path, screened)
        return screened.samples

    def screen(self, name: str, path: Path, processor: Processor | None) -> Screened | None:
        """The file's usable samples; None when the configuration asks neither for skipping nor for a limit."""
        data = self._run.config.data
        limit = data.max_prompt_tokens if processor is not None else None
        if data.on_bad_sample == "raise" and limit is None:
            return None
        problems: list[DataError] | None = [] if data.on_bad_sample == "skip" else None
        samples = open_samples(self._run.config, name, path, problems)
        return screen(samples, processor=processor, max_prompt_tokens=limit, problems=problems, each=self._poll(name))

    def _poll(self, name: str) -> Callable[[], None]:
        return lambda: self._run.stop.poll(f"reading data.{name}")

    def _tell(self, name: str, path: Path, screened: Screened) -> None:
        run = self._run
        if run.resume.checkpoint_of(self._stage) is not None:
            return
        tokens = screened.prompt_tokens
        lengths = {"data/prompt_tokens_max": max(tokens), "data/prompt_tokens_mean": sum(tokens) / len(tokens)}
        counts = {f"data/{key}": count for key, count in screened.counts().items()}
        record = {"name": name, "before": self._stage} | counts | (lengths if tokens else {})
        run.metrics.write("data", 0, record)
        if screened.problems:
            first = f"; first: {screened.problems[0]}"
            line = f"data.{name}: {_shown(screened)} of {path}{first}"
            run.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _shown(screened: Screened) -> str:
    return ", ".join(
        f"{count} {key.replace('_', ' ')}" for key, count in screened.counts().items() if count or key == "kept"
    )
