"""Checks before the first step of a run; a run and ``--dry-run`` make the same ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config, ConfigError, dump_config
from prism_fast.data.digits import check_digits
from prism_fast.data.entries import shown
from prism_fast.data.formats import SOURCES
from prism_fast.data.notes import notes_on
from prism_fast.data.samples import Samples, Task
from prism_fast.models.checkpoints import open_weights, read_model_type, weight_files
from prism_fast.models.processor import Processor
from prism_fast.models.score_head import read_head
from prism_fast.models.sizes import ModelSize, discriminator_size
from prism_fast.models.tokenizer import check_vocab_size
from prism_fast.models.writing import DiskFullError, shown_bytes
from prism_fast.plan import (
    adamw_bytes,
    check_positions,
    discriminator_config,
    make_plan,
    policy_config,
    summary,
    trained_size,
)
from prism_fast.rewards import SourceRewards
from prism_fast.train.context import (
    DTYPES,
    answer_checker,
    attention_in_force,
    check_engine,
    check_views,
    losses_in_force,
    resolve_device,
    trunk_in_force,
)
from prism_fast.train.grading import judged
from prism_fast.train.reading import DataFiles, open_samples
from prism_fast.train.replay import check_replay

WARNING = "warning: "


def show_run(config: Config, console: Console) -> None:
    """Check a resolved configuration (raises like :func:`preflight`); print it, its memory peaks and its inputs."""
    lines = preflight(config)
    peaks = summary(make_plan(config))
    console.print(dump_config(config), markup=False, highlight=False, soft_wrap=True)
    console.print(peaks)
    console.print("(`prism-fast plan` shows what they consist of and what they assume)", style="dim")
    for line in lines:
        style = "bold yellow" if line.startswith(WARNING) else None
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    console.print("dry run: everything is there, nothing was written", style="green")


def preflight(config: Config, *, resume: bool = False) -> list[str]:
    """Check device, run directory, order of stages, checkpoints, data files, reward functions and disk; nothing is
    written.

    Data files are opened and every row is parsed; images are not decoded (``prism-fast data check`` does). Of weights,
    the headers are read. Reward functions of the recipe are called with odd texts for one row of theirs. ``resume``:
    the run directory may hold something.

    Returns:
        Lines for the console: device, kernels, run directory, models, data and disk. Those that begin with `WARNING`
        are shown before a run too.

    Raises:
        ConfigError, FileNotFoundError, ValueError: names the first fault.
    """
    device = resolve_device(config.device)
    lines = [f"device: {device}", f"norms, rotary and SwiGLU: {trunk_in_force(config, device)}"]
    lines.append(f"attention: {attention_in_force(config, device)}")
    lines += [f"{key}: {terms}" for key, terms in losses_in_force(config).items()]
    check_engine(config)
    if config.out is not None and not resume:
        folder = Path(config.out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"the run directory {folder} is not empty; give another with out=PATH")
    _check_writable(Path(config.out or "runs"))
    lines.append(f"run directory: {config.out or 'a new one under runs'}")
    _check_order(config)
    check_views(config)
    check_replay(config)
    rewards = answer_checker(config)  # a judge's key must be set, a reward function importable
    differs = SEMANTICS[config.semantics].differs
    lines += [f"semantics={config.semantics} differs from the published code: {line}" for line in differs]
    lines += _check_models(config)
    with rewards:
        lines += _check_data(config, rewards)
    return [*lines, check_space(config)]


def check_space(config: Config) -> str:
    """Check that the disk has room for a run's checkpoints and exports; those of a resumed run count as room.

    Returns:
        A line with the bytes needed and free.

    Raises:
        ConfigError: a model folder is wrong.
        DiskFullError: there is too little.
    """
    needs = disk_needs(config)
    folder = Path(config.out or "runs")
    written = sum(
        file.stat().st_size
        for part in ("checkpoints", "export")
        for file in (folder / part).rglob("*")
        if file.is_file()
    )
    free = shutil.disk_usage(_nearest_place(folder)).free
    total = sum(needs.values())
    parts = ", ".join(f"{name} {shown_bytes(count)}" for name, count in needs.items())
    if total - written > free:
        raise DiskFullError(
            f"the run needs {shown_bytes(total)} in {folder} ({parts}), {shown_bytes(written)} are there and "
            f"{shown_bytes(free)} are free: make room, keep fewer checkpoints (keep_checkpoints=1) or take another "
            "disk (out=PATH)"
        )
    return f"disk: {shown_bytes(total)} ({parts}), {shown_bytes(free)} free"


def _nearest_place(folder: Path) -> Path:
    """The innermost of ``folder`` and its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _check_writable(folder: Path) -> None:
    """Raise ConfigError where the run directory could not be made or written."""
    place = _nearest_place(folder)
    if not place.is_dir():
        raise ConfigError(
            f"the run directory {folder} cannot be made: {place} is not a folder; give another with out=PATH"
        )
    if not os.access(place, os.W_OK | os.X_OK):  # also False where the file system is mounted read-only
        raise ConfigError(
            f"the run directory {folder} cannot be written: {place} is read-only; give another with out=PATH"
        )


def disk_needs(config: Config) -> dict[str, int]:
    """Bytes that a run keeps on the disk, by kind: checkpoints (one more than configured while it is written) and
    exports. Metrics, rollouts and the built-in data are small beside them."""
    dtype = DTYPES[config.model.dtype]
    dense = policy_config(config)
    discriminator = discriminator_size(discriminator_config(config, dense), dtype)
    models = []
    for stage in config.stages:
        policy = [] if stage == "warmup" else [trained_size(config, dense, stage)]
        models.append([*policy, *([discriminator] if stage in ("warmup", "align") else [])])
    # A checkpoint holds the masters, which take as many bytes as the gradients, and what is frozen.
    largest = max((sum(_saved_bytes(size) for size in sizes) for sizes in models), default=0)
    kept = config.keep_checkpoints + 1
    return {
        f"{kept} checkpoints": kept * largest,
        "exports": sum(size.weight_bytes for sizes in models for size in sizes),
    }


def _saved_bytes(size: ModelSize) -> int:
    return size.gradient_bytes + size.frozen_bytes + adamw_bytes(size)


def _check_order(config: Config) -> None:
    """Raise ConfigError where a stage has no model: neither an earlier stage nor a folder gives it."""
    policy, discriminator = config.model.policy != "tiny", config.model.discriminator != "upcycle"
    if not config.stages:
        raise ConfigError("stages is empty: nothing to run")
    for stage in config.stages:
        if stage != "sft" and not policy:
            raise ConfigError(f"stage {stage} needs a trained policy: run sft before it or give model.policy=PATH")
        if stage == "align" and not discriminator:
            raise ConfigError(
                "stage align needs a warm discriminator: run warmup before it or give model.discriminator=PATH"
            )
        policy, discriminator = policy or stage == "sft", discriminator or stage == "warmup"


def _check_models(config: Config) -> list[str]:
    lines = []
    if config.model.policy == "tiny":
        check_vocab_size(config.model.tiny.vocab_size)
        check_positions(config, policy_config(config), prompt=1)
    else:
        folder = Path(config.model.policy)
        check_positions(config, policy_config(config), prompt=1)
        _read_headers(folder)
        limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
        low, high = Processor.from_pretrained(folder, **limits).image_area
        lines += [f"policy: {folder}", f"images: resized to between {low:,} and {high:,} pixels"]
    if config.model.discriminator != "upcycle":
        folder = Path(config.model.discriminator)
        discriminator = discriminator_config(config, policy_config(config))
        _read_headers(folder)
        read_head(folder, discriminator.text_config.hidden_size)
        lines.append(f"discriminator: {folder}")
    return lines


def _read_headers(folder: Path) -> None:
    read_model_type(folder)
    for file in weight_files(folder):
        with open_weights(file) as tensors:  # a truncated file is found here
            tensors.keys()


def _check_data(config: Config, rewards: SourceRewards) -> list[str]:
    data = config.data
    if data.source == "digits":
        check_digits(data.digits)
        return ["data: the built-in digits, written when the run starts"]
    lines = []
    for key, value in DataFiles.of(config).needed(config.stages).items():
        problems = [] if data.on_bad_sample == "skip" else None
        samples = open_samples(config, key, value, problems)
        skipped = f", {len(problems)} rows to skip" if problems else ""
        lines.append(f"data.{key}: {shown(value)}, {len(samples)} samples{skipped}")
        if SOURCES[key].role == "tasks":
            notes = notes_on(samples, own=config.reward.functions)
            lines += [f"{WARNING}data.{key}: {note}" for note in notes]
            if rewards.functions:
                _probe(samples, rewards)
    return lines


def _probe(samples: Samples[Task], rewards: SourceRewards) -> None:
    """Call each reward function of the recipe on the first row that it grades."""
    left = set(rewards.functions)
    for index in range(len(samples)):
        task = samples.without_images(index)
        if task.data_source in left:
            left.remove(task.data_source)
            rewards.probe(judged(task, task.teacher_response or task.ground_truth))
