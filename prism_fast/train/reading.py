"""Reads a run's data: chooses the reader of each key and handles samples that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_fast.config import Config, ConfigError
from prism_fast.data import formats
from prism_fast.data.entries import entries_of, shown
from prism_fast.data.formats import SOURCES, needed_sources
from prism_fast.data.notes import notes_on
from prism_fast.data.pairs import PAIR_RESPONSES, PAIR_SPANS
from prism_fast.data.parsing import Settings, Wanted
from prism_fast.data.problems import DataError
from prism_fast.data.samples import Demonstration, Samples
from prism_fast.data.screen import Screened, screen
from prism_fast.data.sources import missing, nearest
from prism_fast.data.split import split_samples
from prism_fast.data.system_prompt import system_prompt
from prism_fast.models.processor import Processor
from prism_fast.rewards.routes import known_sources
from prism_fast.train.context import Run
from prism_fast.train.seeds import derive_seed


def open_samples(config: Config, name: str, value: Any, problems: list[DataError] | None = None) -> Samples:
    """The samples of ``data.<name>``, which is ``value``: every row parsed, no image decoded. Rows that cannot be used
    go to ``problems``; without that list the first is raised (DataError)."""
    judge = config.reward.judge.url is not None
    known = (*known_sources(judge=judge), *config.reward.functions)
    cure = "It needs a judge: set reward.judge.url and reward.judge.model"
    wanted = Wanted(
        require_teacher=SOURCES[name].require_teacher,
        known_sources=known,
        needs={source: cure for source in known_sources(judge=True) if source not in known},
        pair_texts=PAIR_SPANS if config.align.discriminate == "spans" else PAIR_RESPONSES,
    )
    settings = Settings(
        wanted,
        columns=config.data.columns,
        image_root=config.data.image_root,
        system_prompt=system_prompt(config.data.system_prompt),
        max_image_pixels=config.data.max_image_pixels,
    )
    source, key = SOURCES[name], f"data.{name}"
    return formats.open_samples(value, source.role, settings, key=key, split=source.split, problems=problems)


@dataclass(frozen=True)
class DataFiles:
    """Of each key of ``SOURCES`` that has one, the value: a path or all else that `entries_of` reads."""

    paths: dict[str, Any]

    @classmethod
    def of(cls, config: Config) -> DataFiles:
        """The data that a configuration names; it need not exist."""
        named = {key: getattr(config.data, key) for key in SOURCES}
        return cls({key: value for key, value in named.items() if value is not None})

    def need(self, name: str, stage: str) -> Any:
        value = self.paths.get(name)
        if value is None:
            raise ConfigError(f"stage {stage} needs data.{name}=PATH (or data.source=digits)")
        for entry in entries_of(value, f"data.{name}"):
            if missing(entry):
                raise ConfigError(f"data.{name}: {entry.path} does not exist{nearest(Path(entry.path))}")
        return value

    def needed(self, stages: Sequence[str]) -> dict[str, Any]:
        """The data that ``stages`` read, by key. ConfigError names a missing one."""
        return {key: self.need(key, stage) for key, stage in needed_sources(stages, self.paths).items()}


class DataReader:
    """Reads the files of one stage. ``data.on_bad_sample``: a bad sample is an error, or is left out and counted.

    With ``skip`` or ``data.max_prompt_tokens`` every image is decoded once, and omissions are shown on the console and
    logged under the stage ``data``. A run resumed inside the stage does not log them a second time.
    """

    def __init__(self, run: Run, stage: str):
        self._run, self._stage = run, stage

    def read(self, name: str, value: Any, processor: Processor | None, *, tell: bool = True) -> Samples:
        """The usable samples of ``data.<name>``. Without a ``processor`` no length is known and none is limited. Their
        fingerprint goes to the run, whose checkpoints keep it.

        Raises:
            DataError: the file cannot be read, or it holds a bad sample and these are not to be skipped.
            ConfigError: no sample is left.
        """
        screened = self.screen(name, value, processor)
        if screened is None:
            samples = open_samples(self._run.config, name, value)
        elif not len(screened.samples):
            raise ConfigError(
                f"data.{name}: no usable sample is left of {shown(value)}: {_shown(screened)}. "
                f"First problem: {screened.problems[0]}"
            )
        else:
            samples = screened.samples
        if tell and not self._resumed():
            if screened is not None:
                self._tell(name, value, screened)
            if name not in self._run.fingerprints and SOURCES[name].role == "tasks":
                for note in notes_on(samples, own=self._run.config.reward.functions):
                    self._say(f"data.{name}: {note}")
        self._run.fingerprints[name] = samples.fingerprint()
        return samples

    def demonstrations(
        self, files: DataFiles, processor: Processor | None, *, tell: bool = True
    ) -> tuple[Samples[Demonstration], Samples[Demonstration] | None]:
        """The demonstrations to train on, and those cut off them for validation: None where ``data.sft_val`` is given.

        Raises:
            DataError, ConfigError: as `read` and `split_samples`.
        """
        config = self._run.config
        samples = self.read("sft", files.need("sft", self._stage), processor, tell=tell)
        if "sft_val" in files.paths:
            return samples, None
        seed = derive_seed(config.seed, "data", "validation")
        training, validation = split_samples(samples, config.data.validation_split, seed)
        if tell and not self._resumed():
            share = f"data.validation_split={config.data.validation_split}"
            self._say(f"data.sft: {len(training)} samples to train on, {len(validation)} to validate ({share})")
        return training, validation

    def screen(self, name: str, value: Any, processor: Processor | None) -> Screened | None:
        """The file's usable samples; None when the configuration asks neither for skipping nor for a limit."""
        data = self._run.config.data
        limit = data.max_prompt_tokens if processor is not None else None
        if data.on_bad_sample == "raise" and limit is None:
            return None
        problems: list[DataError] | None = [] if data.on_bad_sample == "skip" else None
        samples = open_samples(self._run.config, name, value, problems)
        return screen(samples, processor=processor, max_prompt_tokens=limit, problems=problems, each=self._poll(name))

    def _poll(self, name: str) -> Callable[[], None]:
        return lambda: self._run.stop.poll(f"reading data.{name}")

    def _resumed(self) -> bool:
        return self._run.resume.checkpoint_of(self._stage) is not None

    def _say(self, line: str) -> None:
        self._run.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _tell(self, name: str, value: Any, screened: Screened) -> None:
        tokens = screened.prompt_tokens
        lengths = {"data/prompt_tokens_max": max(tokens), "data/prompt_tokens_mean": sum(tokens) / len(tokens)}
        counts = {f"data/{key}": count for key, count in screened.counts().items()}
        record = {"name": name, "before": self._stage} | counts | (lengths if tokens else {})
        self._run.metrics.write("data", 0, record)
        if screened.problems:
            first = f"; first: {screened.problems[0]}"
            self._say(f"data.{name}: {_shown(screened)} of {shown(value)}{first}")


def _shown(screened: Screened) -> str:
    return ", ".join(
        f"{count} {key.replace('_', ' ')}" for key, count in screened.counts().items() if count or key == "kept"
    )
