"""The ``prism-fast`` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import prism_fast
from prism_fast.bench.command import app as bench
from prism_fast.commands import Overrides, Recipe, existing_run, register

if TYPE_CHECKING:
    from prism_fast.config import Config
    from prism_fast.engine.world import World

HELP = """Train multimodal models with PRISM: SFT, adversarial alignment against an expert discriminator, RLVR.

A RECIPE is the name of a shipped recipe (`digits` runs anywhere) or the path of a YAML file. OVERRIDES are
`key.sub=value` pairs, e.g. `seed=2 align.steps=100 out=runs/mine`."""

MEANT = {"train": "run", "start": "run", "continue": "resume", "evaluate": "eval", "test": "eval"}


class _Commands(TyperGroup):
    """Knows the commands by the names that they have elsewhere; the nearest spelling of `train` is `align`."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        if args and args[0] in MEANT:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {MEANT[args[0]]!r}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands, help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
console = Console()
errors = Console(stderr=True)

TRAINING = ("run", "resume", "sft", "warmup", "align", "rlvr", "eval")  # exit code 0 when they are told to stop
Profile = Annotated[
    int | None, typer.Option("--profile", help="Write a trace of so many steps of each stage to RUN/profile.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check recipe, models and data, show the plan, write nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prism-fast {prism_fast.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _train(
    recipe: str, overrides: list[str] | None, stages: list[str] | None, dry_run: bool, profile: int | None
) -> None:
    from prism_fast.config import load_config

    config = load_config(recipe, [*(overrides or []), *([] if profile is None else [f"profile={profile}"])])
    if stages is not None:
        config.stages = stages
    if dry_run:
        from prism_fast.preflight import show_run

        show_run(config, console)
    else:
        _run(config, resume=False)


@contextmanager
def _ranks(config: Config) -> Iterator[World]:
    """The ranks of the launcher, which write and speak through the first of them."""
    from prism_fast.engine.launch import joined
    from prism_fast.train.context import run_folder

    with joined(config.engine.kind, config.device, timedelta(seconds=config.engine.patience_s)) as world:
        console.quiet = not world.first
        config.out = world.of_first(str(run_folder(config)))  # a new one is named by the clock
        yield world


def _run(config: Config, *, resume: bool, convert: bool = False) -> None:
    with _ranks(config) as world:
        _stages(config, world, resume=resume, convert=convert)


def _stages(config: Config, world: World, *, resume: bool, convert: bool) -> None:
    from prism_fast.config import ConfigError
    from prism_fast.preflight import WARNING, preflight
    from prism_fast.track.jsonl import RecordError
    from prism_fast.train.checkpoint import CheckpointError
    from prism_fast.train.context import run_folder
    from prism_fast.train.pipeline import run_stages
    from prism_fast.train.signals import Stopped

    folder = run_folder(config)
    ours = resume or not folder.exists() or not any(folder.iterdir())
    for line in world.together(lambda: preflight(config, resume=resume)):
        if line.startswith(WARNING):
            console.print(line, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
    try:
        run_stages(config, console, resume=resume, convert=convert, world=world)
    except Stopped as stopped:
        _say(f"stopped at {stopped}, saved; go on with: prism-fast resume {folder}")
    except Exception as error:  # a failed run gets its report too, one that was refused has not begun
        ours = ours and world.first
        if ours and folder.exists() and not isinstance(error, ConfigError | CheckpointError | RecordError):
            try:
                _show_report(folder)
            except Exception as fault:  # must not hide the failure of the run
                _say(f"no report: {fault}")
        raise
    world.on_first(lambda: _show_report(folder))


def _show_report(folder: Path) -> None:
    from prism_fast.report.html import write_report
    from prism_fast.report.table import stage_table

    report = write_report(folder)
    console.print(stage_table(folder))
    _say(f"run directory: {folder}")
    _say(f"report: {report}")


def _say(text: str) -> None:
    """Print a line that may hold a path: not wrapped, without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, profile: Profile = None) -> None:
    """Run all stages of a recipe, evaluate after each, and write the report."""
    _train(recipe, overrides, None, dry_run, profile)


@app.command()
def resume(
    run_dir: Annotated[
        Path, typer.Argument(help="A run directory that was stopped, killed or failed, or is complete.")
    ],
    overrides: Overrides = None,
    convert_ranks: Annotated[
        bool, typer.Option("--convert-ranks", help="Go on with another number of ranks, within rounding.")
    ] = False,
) -> None:
    """Go on in a run directory exactly where its newest complete checkpoint is. `rlvr.steps=2000` and the like make its
    last stage longer; other settings that learning depends on cannot change."""
    from prism_fast.config import load_config

    config = load_config(str(existing_run(run_dir) / "config.yaml"), overrides or [])
    config.out = str(run_dir)  # the run may have been moved
    from prism_fast.engine.launch import started_ranks  # behind the checks: it imports torch

    if convert_ranks and started_ranks() > 1:
        config.engine.kind = "deepspeed"
    if config.stages:
        _run(config, resume=True, convert=convert_ranks)
    else:
        _evaluate(config, resume=True)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, profile: Profile = None) -> None:
    """Supervised fine-tuning to the validation plateau."""
    _train(recipe, overrides, ["sft"], dry_run, profile)


@app.command()
def warmup(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, profile: Profile = None) -> None:
    """Warm the discriminator up until it separates held-out pairs. Needs model.policy=PATH."""
    _train(recipe, overrides, ["warmup"], dry_run, profile)


@app.command()
def align(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, profile: Profile = None) -> None:
    """Adversarial alignment. Needs model.policy=PATH and model.discriminator=PATH."""
    _train(recipe, overrides, ["align"], dry_run, profile)


@app.command()
def rlvr(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, profile: Profile = None) -> None:
    """Reinforcement learning with verifiable rewards. Needs model.policy=PATH."""
    _train(recipe, overrides, ["rlvr"], dry_run, profile)


@app.command("eval")
def evaluate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Held-out accuracy of model.policy=PATH."""
    from prism_fast.config import load_config

    config = load_config(recipe, overrides or [])
    config.stages = []  # so that `resume` of its folder evaluates
    _evaluate(config, resume=False)


def _evaluate(config: Config, *, resume: bool) -> None:
    from prism_fast.train.pipeline import run_eval
    from prism_fast.train.signals import Stopped

    with _ranks(config) as world:
        folder = Path(config.out)
        try:
            accuracy = run_eval(config, console, resume=resume, world=world)
        except Stopped as stopped:
            _say(f"stopped at {stopped}, what is answered is kept; go on with: prism-fast resume {folder}")
        else:
            _say(f"accuracy {accuracy:.4f}; items in {folder / 'evals' / 'eval.jsonl'}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, finished or not.")]) -> None:
    """Write report.html of a run and print its stage table."""
    _show_report(existing_run(run_dir))


register(app)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: an error that the user can cure becomes one message and exit code 1; others keep their traceback."""
    # Before torch is imported: OpenMP threads that spin while they wait make a shared machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # These handlers cover the seconds of imports; a run in progress sets its own (train/signals.py).
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        app()
    except Exception as error:
        if os.environ.get("PRISM_FAST_TRACEBACK") == "1" or not _curable(error):
            raise
        if int(os.environ.get("LOCAL_RANK", "0")) and not console.quiet:
            sys.exit(1)  # before the ranks have met each finds the same; the first of a node tells it
        rank = f"rank {os.environ['RANK']}, " if console.quiet else ""
        errors.print(f"[bold red]error:[/] {rank}{type(error).__name__}", highlight=False)
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, ImportError):
            errors.print("`prism-fast doctor` shows what is missing or broken and how to get it")
        errors.print("(PRISM_FAST_TRACEBACK=1 shows where)", style="dim")
        sys.exit(1)
    finally:
        for number, handler in before.items():
            if handler is not None:  # a handler that was not set from Python cannot be restored
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind, so that incomplete files are removed. Training has not begun or is over, so its exit code is that of a
    requested stop; other commands exit with a failure, as they did not finish."""
    for further in (signal.SIGTERM, signal.SIGINT):
        signal.signal(further, signal.SIG_IGN)  # a second signal would interrupt the clean-up
    os.write(2, f"stopped by {signal.Signals(number).name}; no step was in progress, nothing is lost\n".encode())
    trains = sys.argv[1:2] and sys.argv[1] in TRAINING and "--dry-run" not in sys.argv
    sys.exit(0 if trains else 128 + number)


def _curable(error: Exception) -> bool:
    """Whether the user can cure the error by its message."""
    if isinstance(error, ImportError):  # of another package; of our own modules it is a defect
        return not (error.name or "").startswith("prism_fast")
    if isinstance(error, ValueError | OSError):  # a wrong key is answered at once: before torch, which takes seconds
        return True
    try:
        from prism_fast.train.errors import USER_ERRORS
    except ImportError:  # `doctor` starts without the trainer
        return False
    return isinstance(error, USER_ERRORS)


if __name__ == "__main__":
    main()
