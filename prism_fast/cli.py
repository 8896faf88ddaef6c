"""The ``prism-fast`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import prism_fast
from prism_fast.commands import Overrides, Recipe, register

if TYPE_CHECKING:
    from prism_fast.config import Config

HELP = """Train multimodal models with PRISM: SFT, adversarial alignment against an expert discriminator, RLVR.

A RECIPE is the name of a shipped recipe (`digits` runs anywhere) or the path of a YAML file. OVERRIDES are
`key.sub=value` pairs, e.g. `seed=2 align.steps=100 out=runs/mine`."""

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console()
errors = Console(stderr=True)

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


def _train(recipe: str, overrides: list[str] | None, stages: list[str] | None, dry_run: bool) -> None:
    from prism_fast.config import load_config

    config = load_config(recipe, overrides or [])
    if stages is not None:
        config.stages = stages
    if dry_run:
        from prism_fast.dry_run import show_run

        show_run(config, console)
    else:
        _run(config, resume=False)


def _run(config: Config, *, resume: bool) -> None:
    from prism_fast.report.html import write_report
    from prism_fast.report.table import stage_table
    from prism_fast.train.context import run_folder
    from prism_fast.train.pipeline import run_stages
    from prism_fast.train.signals import Stopped

    folder = run_folder(config)
    ours = resume or not folder.exists() or not any(folder.iterdir())
    try:
        run_stages(config, console, resume=resume)
    except Stopped as stopped:
        console.print(f"stopped at {stopped}, saved; go on with: prism-fast resume {folder}", soft_wrap=True)
    finally:  # a run that failed half-way deserves its report most
        if ours and folder.exists():
            report = write_report(folder)
            console.print(stage_table(folder))
            console.print(f"run directory: {folder}", highlight=False, soft_wrap=True)
            console.print(f"report: {report}", highlight=False, soft_wrap=True)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run all stages of a recipe, evaluate after each, and write the report."""
    _train(recipe, overrides, None, dry_run)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="A run directory that was stopped, killed or failed.")],
) -> None:
    """Go on in a run directory exactly where its newest complete checkpoint is."""
    from prism_fast.config import ConfigError, load_config

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml")
    config = load_config(str(path))
    config.out = str(run_dir)  # the run may have been moved
    _run(config, resume=True)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Supervised fine-tuning to the validation plateau."""
    _train(recipe, overrides, ["sft"], dry_run)


@app.command()
def warmup(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Warm the discriminator up until it separates held-out pairs. Needs model.policy=PATH."""
    _train(recipe, overrides, ["warmup"], dry_run)


@app.command()
def align(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Adversarial alignment. Needs model.policy=PATH and model.discriminator=PATH."""
    _train(recipe, overrides, ["align"], dry_run)


@app.command()
def rlvr(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Reinforcement learning with verifiable rewards. Needs model.policy=PATH."""
    _train(recipe, overrides, ["rlvr"], dry_run)


@app.command("eval")
def evaluate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Held-out accuracy of model.policy=PATH."""
    from prism_fast.config import load_config
    from prism_fast.train.pipeline import run_eval

    folder, accuracy = run_eval(load_config(recipe, overrides or []), console)
    console.print(
        f"accuracy {accuracy:.4f}; items in {folder / 'evals' / 'eval.jsonl'}", highlight=False, soft_wrap=True
    )


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory, finished or not.")]) -> None:
    """Write report.html of a run and print its stage table."""
    from prism_fast.report.html import write_report
    from prism_fast.report.table import stage_table

    path = write_report(run_dir)
    console.print(stage_table(run_dir))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


register(app)


def main() -> None:
    """Entry point: an error the user can cure is one message and exit code 1; anything else keeps its traceback."""
    # Before torch is imported: OpenMP threads that spin while they wait make a shared machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except Exception as error:
        if os.environ.get("PRISM_FAST_TRACEBACK") == "1" or not _curable(error):
            raise
        errors.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, ImportError):
            errors.print("`prism-fast doctor` shows what is missing or broken and how to get it")
        errors.print("(PRISM_FAST_TRACEBACK=1 shows where)", style="dim")
        sys.exit(1)


def _curable(error: Exception) -> bool:
    """Whether the message alone helps. Asked afterwards: `doctor` must start where the trainer cannot be imported."""
    if isinstance(error, ImportError):  # not of our own modules: that would be a defect
        return not (error.name or "").startswith("prism_fast")
    try:
        from prism_fast.config import ConfigError
        from prism_fast.train.errors import USER_ERRORS
    except ImportError:
        return False
    return isinstance(error, (ConfigError, OSError, *USER_ERRORS))


if __name__ == "__main__":
    main()
