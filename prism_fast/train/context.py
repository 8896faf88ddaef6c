"""A run: its folder, device, metrics, progress and answer checker."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from operator import attrgetter
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import prism_fast
from prism_fast.algorithms.presets import reward_normalization, shown_terms
from prism_fast.config import Config, ConfigError, dump_config
from prism_fast.engine.finite import NonFiniteError
from prism_fast.engine.launch import started_ranks
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Engine
from prism_fast.engine.world import World
from prism_fast.models.fused_trunk import trunk_kernels
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.writing import clear_partial, whole_folder, write_whole
from prism_fast.ops import backend, flash
from prism_fast.rewards import AnswerChecker, Judge, SourceRewards
from prism_fast.rewards.rules import RULES
from prism_fast.rollout.engines import engine_maker
from prism_fast.rollout.protocol import Rollout
from prism_fast.track.tracker import Tracker, Untracked, open_views, require_packages
from prism_fast.train.discriminator_trainer import discriminator_loss_of
from prism_fast.train.engines import check_learning, make_engine, whole_weights
from prism_fast.train.progress import Progress
from prism_fast.train.record import Resume, RunRecord, new_run, read_resume, told
from prism_fast.train.rollout_gap import RolloutGapError
from prism_fast.train.signals import Stopped, StopRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    config: Config
    folder: Path
    device: torch.device
    dtype: torch.dtype
    metrics: Tracker | Untracked
    checker: SourceRewards
    console: Console
    progress: Progress
    stop: StopRequest
    resume: Resume
    world: World = field(default_factory=World)
    rollout_budget: TokenBudget = field(init=False)
    # Of the data read so far, by its key under `data`; a checkpoint keeps them, and a resumed run compares.
    fingerprints: dict[str, str] = field(init=False, default_factory=dict)
    _rollout: Rollout | None = field(init=False, default=None)
    _engines: list[Engine] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        def tell(text: str) -> None:
            self.console.print(f"generation: {text}", style="yellow", markup=False, highlight=False)

        self.rollout_budget = TokenBudget(self.config.rollout.tokens_in_flight, notify=tell, piece="chunk of responses")

    @property
    def record(self) -> RunRecord:
        return self.resume.record

    def engine(
        self, module: nn.Module, config: OptimizerConfig, schedule: Callable[[int], float] | None = None
    ) -> Engine:
        """See `train.engines.make_engine`; closed with `close_engines`."""
        self._engines.append(make_engine(self.config, self.world, module, config, schedule))
        return self._engines[-1]

    def close_engines(self) -> None:
        """The end of what a stage trains; its weights are exported."""
        for engine in self._engines:
            engine.close()
        self._engines.clear()

    def rollout_engine(self, policy: nn.Module, processor: Processor, *, learns: bool = False) -> Rollout:
        """The run's one rollout engine, attached to ``policy``; made at the first call and closed with the run.
        ``learns``: the policy is about to be trained, its engine not yet made."""
        if learns and self.config.engine.shards_weights and self.config.rollout.engine == "hf":
            policy = copy.deepcopy(policy).requires_grad_(False)  # stays whole; `Rollout.sync` brings the weights
        if self._rollout is None:
            make = engine_maker(self.config.rollout.engine, self.config.rollout.vllm)
            self._rollout = make(policy, processor, self.rollout_budget)
        else:
            self._rollout.attach(policy, processor)
        return self._rollout

    def close(self) -> None:
        if self._rollout is not None:
            self._rollout.close()

    def complete(self, name: str) -> None:
        """Joint. Record that ``name`` is done: a resumed run skips it."""
        self.record.completed.append(name)
        self.record.metrics_bytes = self.metrics.size()
        self.world.on_first(lambda: self.record.write(self.folder))

    def export(self, name: str, engine: Engine, save: Callable[[Path, Mapping[str, Tensor]], None]) -> Path:
        """Joint. Write a stage's model in Hugging Face format, whole or not at all; returns its folder. ``save`` gets a
        folder and the weights of the engine's module by name.

        Raises:
            DiskFullError: too little room; the export of an earlier stage stays as it is.
        """
        weights = whole_weights(engine, self.world)
        needs = sum(weight.nbytes for weight in weights.values())
        return self.write_export(name, lambda folder: save(folder, weights), needs=needs)

    def write_export(self, name: str, save: Callable[[Path], None], *, needs: int) -> Path:
        """Joint. ``export/<name>`` as ``save`` writes it on rank 0, whole or not at all. ``needs``: bytes."""
        folder = self.folder / "export" / name

        def write() -> None:
            with whole_folder(folder, replace=True, needs=needs) as partial:  # replaces one if resumed at its end
                save(partial)

        self.world.on_first(write)
        return folder


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


def trunk_in_force(config: Config, device: torch.device) -> str:
    """The kernels that ``model.fused_trunk`` selects on ``device``. Raises ConfigError if they cannot run."""
    try:
        return trunk_kernels(config.model.fused_trunk, device, DTYPES[config.model.dtype])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def attention_in_force(config: Config, device: torch.device) -> str:
    """The attention that ``model.attention`` selects on ``device``. Raises ConfigError if it cannot run."""
    try:
        asked = os.environ.get(backend.ENVIRONMENT) or None
        return flash.describe(config.model.attention, device, DTYPES[config.model.dtype], asked)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def environment(config: Config, device: torch.device) -> dict[str, str | int]:
    """Versions, machine, kernels and losses in use, for ``environment.json`` and the report. Raises as
    :func:`trunk_in_force` and :func:`attention_in_force`."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "math-verify")
    versions = {name: metadata.version(name) for name in names}
    facts: dict[str, str | int] = {
        "prism_fast": prism_fast.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **versions,
        "norms, rotary and SwiGLU": trunk_in_force(config, device),
        "attention": attention_in_force(config, device),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | losses_in_force(config)


def losses_in_force(config: Config) -> dict[str, str]:
    """The terms of the losses of the stages of ``config``, presets and defaults of ``semantics`` resolved, by key."""
    facts = {}
    if "align" in config.stages:
        longest, changes = config.align.rollout.max_new_tokens, config.align.loss_terms.options()
        facts["align.loss"] = shown_terms(config.align.loss, max_response=longest, **changes)
        terms = asdict(discriminator_loss_of(config))
        facts["align.discriminator"] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in terms.items())
    if {"rlvr", "rlvr_direct"} & set(config.stages):
        longest, changes = config.rlvr.rollout.max_new_tokens, config.rlvr.loss_terms.options()
        shown = shown_terms(config.rlvr.loss, max_response=longest, **changes)
        facts["rlvr.loss"] = f"{shown}, rewards normalised {reward_normalization(config.rlvr.loss)}"
    return facts


def check_engine(config: Config) -> None:
    """Raise ConfigError if an engine, of rollouts or of training, is not known or cannot be used as the recipe says."""
    check_learning(config, started_ranks())
    try:
        engine_maker(config.rollout.engine, config.rollout.vllm)
        if config.rollout.engine == "vllm":
            from prism_fast.rollout.vllm_build import check_temperature

            for stage in ("warmup", "align.rollout", "rlvr.rollout", "eval"):
                check_temperature(attrgetter(stage)(config).temperature, f"{stage}.temperature")
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error


def run_folder(config: Config) -> Path:
    """The run directory: ``out``, or a new name under ``runs``, which becomes ``out``."""
    if config.out is None:
        config.out = str(Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Path(config.out)


def grading_rules(config: Config) -> str:
    """Name of the rules that compare answers. The paper states none, so ``paper`` uses the default ones."""
    return config.semantics if config.semantics in RULES else "prism_fast"


def answer_checker(config: Config) -> SourceRewards:
    """The reward functions of a run. Raises RewardFunctionError where ``reward.functions`` cannot be used."""
    reward = config.reward
    checker = AnswerChecker(
        semantics=grading_rules(config),
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        memory_mb=reward.memory_mb,
        max_answer_chars=reward.max_answer_chars,
        judge=None if reward.judge.url is None else Judge(**asdict(reward.judge)),
    )
    return SourceRewards(checker, reward.functions)


def check_views(config: Config) -> None:
    """Raise ValueError if the package of a configured view is not installed."""
    track = config.track
    require_packages(wandb=track.wandb.project is not None, trackio=track.trackio.project is not None)


@contextmanager
def open_run(
    config: Config, console: Console, *, resume: bool = False, convert: bool = False, world: World | None = None
) -> Iterator[Run]:
    """Joint. Create the run directory (it must not exist or be empty), or with ``resume`` go on in it. ``convert``:
    also from a checkpoint of another number of ranks or of another engine. ``world``: None: of one rank.

    Raises:
        ConfigError: the folder is not empty, another process uses it, or the device or an engine does not exist.
        ValueError: as :func:`check_views`.
    """
    world = World() if world is None else world
    device = resolve_device(config.device)
    check_engine(config)
    check_views(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = run_folder(config)
    with ExitStack() as stack:
        world.on_first(lambda: stack.enter_context(_own(folder, resume=resume)))
        world.together(lambda: _seen(folder, world))
        try:
            with _opened(config, console, folder, device, world, resume=resume, convert=convert) as run:
                yield run
        except (Exception, SystemExit) as error:
            # Refused or stopped before the first step: remove the folder, so that a second try finds none.
            refused = not resume and not isinstance(error, (Stopped, NonFiniteError, RolloutGapError))
            if world.first and refused and _nothing_done(folder):
                shutil.rmtree(folder)
            raise


@contextmanager
def _own(folder: Path, *, resume: bool) -> Iterator[None]:
    """Create and lock the run directory, and remove what a process that was killed had begun to write."""
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        for subfolder in (folder, folder / "data", folder / "export", folder / "evals"):
            clear_partial(subfolder)
        if not resume and any(folder.iterdir()):
            raise ConfigError(
                f"the run directory {folder} is not empty; give another with out=PATH, or go on in it: "
                f"prism-fast resume {folder}"
            )
        yield


def _seen(folder: Path, world: World) -> None:
    """Raise ConfigError where a rank does not see the run directory that rank 0 made."""
    if not folder.is_dir():
        raise ConfigError(
            f"rank {world.rank} does not see the run directory {folder.absolute()}, which rank 0 has made: put it on a "
            "file system that all nodes share (out=PATH)"
        )


def _record(folder: Path, recipe: str, world: World, console: Console, *, resume: bool, convert: bool) -> Resume:
    """Joint. The record of a new run, written, or that of the run in ``folder``."""

    def tell(text: str) -> None:
        console.print(text, style="yellow", highlight=False)

    def read() -> Resume:
        return read_resume(folder, recipe, ranks=world.size, convert=convert, tell=tell)

    if not resume:
        world.on_first(lambda: write_whole(folder / "config.yaml", recipe))
        found = new_run(recipe)
    elif world.size == 1:
        found = read()
    else:
        of_first = world.on_first(read)
        found = told(world.of_first(None if of_first is None else of_first.plain()))
    if found.longer:
        world.on_first(lambda: write_whole(folder / "config.yaml", recipe))
    world.on_first(lambda: found.record.write(folder))
    return found


@contextmanager
def _opened(
    config: Config,
    console: Console,
    folder: Path,
    device: torch.device,
    world: World,
    *,
    resume: bool,
    convert: bool,
) -> Iterator[Run]:
    resumed = _record(folder, dump_config(config), world, console, resume=resume, convert=convert)
    facts = environment(config, device)
    world.on_first(lambda: write_whole(folder / "environment.json", json.dumps(facts, indent=1)))
    # CPU kernels are all deterministic; PyTorch warns about a CUDA kernel without a deterministic form.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    disable_progress_bar()  # transformers' bars for each load and save would tear ours
    with (
        _tracker(config, console, folder, resumed, world) as metrics,
        flash.use_attention(config.model.attention, device, DTYPES[config.model.dtype]),
        answer_checker(config) as checker,
        Progress(console) as progress,
        StopRequest(world) as stop,
    ):
        run = Run(
            config,
            folder,
            device,
            DTYPES[config.model.dtype],
            metrics,
            checker,
            console,
            progress,
            stop,
            resumed,
            world,
        )
        try:
            yield run
        finally:
            run.close()


def _tracker(config: Config, console: Console, folder: Path, resumed: Resume, world: World) -> Tracker | Untracked:
    """Joint."""

    def tell(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False)

    def begin() -> Tracker:
        track = config.track
        views = open_views(
            folder,
            wandb=track.wandb.project,
            wandb_mode=track.wandb.mode,
            trackio=track.trackio.project,
            config=asdict(config),
        )
        return Tracker(folder, keep_bytes=resumed.metrics_bytes(), views=views, tell=tell)

    return world.on_first(begin) or Untracked()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock the run directory; the system releases it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is at work in {folder}; stop it first (SIGTERM saves)") from error
        yield
    finally:
        os.close(handle)


def _nothing_done(folder: Path) -> bool:
    """Whether there is neither a line of metrics nor a log of ``chunks``, which may be hours of work before the first
    line."""
    results = (folder / "metrics.jsonl", *folder.rglob("*.chunks"), *folder.glob("evals/*"))
    return not any(path.is_file() and path.stat().st_size for path in results)
