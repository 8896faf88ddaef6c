"""A run: its folder, device, metrics, progress and answer checker."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import prism_fast
from prism_fast.config import Config, ConfigError, dump_config
from prism_fast.rewards import AnswerChecker
from prism_fast.train.metrics import MetricsWriter
from prism_fast.train.progress import Progress
from prism_fast.train.record import Resume, RunRecord, fresh, read_resume
from prism_fast.train.signals import StopRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    config: Config
    folder: Path
    device: torch.device
    dtype: torch.dtype
    metrics: MetricsWriter
    checker: AnswerChecker
    console: Console
    progress: Progress
    stop: StopRequest
    resume: Resume

    @property
    def record(self) -> RunRecord:
        return self.resume.record

    def complete(self, name: str) -> None:
        """Note that ``name`` is done: a resumed run begins behind it."""
        self.record.completed.append(name)
        self.record.metrics_bytes = self.metrics.size()
        self.record.write(self.folder)

    def export_folder(self, name: str) -> Path:
        """Where a stage writes its model in Hugging Face format."""
        return self.folder / "export" / name


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA device")
    return device


def environment() -> dict[str, str | int]:
    """What the run ran on; stands in ``environment.json`` and in the report."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "math-verify")
    versions = {name: metadata.version(name) for name in names}
    facts: dict[str, str | int] = {
        "prism_fast": prism_fast.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **versions,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def run_folder(config: Config) -> Path:
    """The run directory: ``out``, or a fresh name under ``runs``, kept in the configuration from then on."""
    if config.out is None:
        config.out = str(Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Path(config.out)


@contextmanager
def open_run(config: Config, console: Console, *, resume: bool = False) -> Iterator[Run]:
    """Create the run directory (it must not exist or be empty), or with ``resume`` go on in it.

    Raises:
        ConfigError: the folder holds something already, or the device is not there.
    """
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = run_folder(config)
    if resume:
        resumed = read_resume(folder, tell=lambda text: console.print(text, style="yellow", highlight=False))
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"the run directory {folder} is not empty; give another with out=PATH, or go on in it: prism-fast resume"
        )
    else:
        resumed = fresh()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    # CPU kernels are all deterministic; a CUDA kernel without a deterministic form is named in a warning.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    disable_progress_bar()  # transformers' bars for each load and save would tear ours
    metrics = MetricsWriter(folder, keep_bytes=resumed.metrics_bytes())
    try:
        with (
            # The paper prints no rules for comparing answers: under its equations they are graded as by default.
            AnswerChecker(semantics="released" if config.semantics == "released" else "prism_fast") as checker,
            Progress(console) as progress,
            StopRequest() as stop,
        ):
            dtype = DTYPES[config.model.dtype]
            yield Run(config, folder, device, dtype, metrics, checker, console, progress, stop, resumed)
    finally:
        empty = metrics.size() == 0
        metrics.close()
        if (
            empty and not resume
        ):  # refused before the first step: nothing to keep, and nothing in the way of a second try
            shutil.rmtree(folder)
