"""The commands that do not train (``doctor``, ``plan``, ``convert``, ``data``), and completion of command lines."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from prism_fast.data.check import Findings
    from prism_fast.data.parsing import Settings, Wanted
    from prism_fast.data.problems import Place
    from prism_fast.doctor import Check
    from prism_fast.models.processor import Processor

STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red"}


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes and YAML files that begin with ``incomplete``."""
    from prism_fast.config import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    shown = [f"{path}/" if path.is_dir() else str(path) for path in files if not path.name.startswith(".")]
    return names + [name for name in shown if name.startswith(incomplete) and name.endswith((".yaml", ".yml", "/"))]


def complete_override(incomplete: str) -> list[str]:
    """Keys of the configuration, one level at a time: ``al`` to ``align.``, ``align.st`` to ``align.steps=``."""
    from prism_fast.config import Config

    *path, last = incomplete.split(".")
    values = Config()
    for name in path:
        values = getattr(values, name, None)
    if "=" in incomplete or not dataclasses.is_dataclass(values):
        return []
    keys = []
    for field in dataclasses.fields(values):
        if field.name.startswith(last):
            ending = "." if dataclasses.is_dataclass(getattr(values, field.name)) else "="
            keys.append(".".join([*path, field.name]) + ending)
    return keys


def existing_run(path: Path) -> Path:
    """``path``, a run directory; ConfigError naming the one with the most similar name if it is none."""
    from prism_fast.config import ConfigError

    if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        return path
    what = "is not a run directory: it has no config.yaml" if path.exists() else "does not exist"
    runs = [file.parent for folder in {path.parent, Path("runs")} for file in sorted(folder.glob("*/config.yaml"))]
    near = difflib.get_close_matches(path.name, [run.name for run in runs], n=1)
    cure = next((f". Did you mean {str(run)!r}?" for run in runs if [run.name] == near), "")
    raise ConfigError(f"{path} {what}{cure}")


Recipe = Annotated[str, typer.Argument(help="Shipped recipe or path of a YAML file.", autocompletion=complete_recipe)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.sub=value pairs that override the recipe.", autocompletion=complete_override),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Source = Annotated[Path, typer.Argument(help="Folder to read.")]
Destination = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]

console = Console()
convert = typer.Typer(no_args_is_help=True, help="Turn checkpoint folders into others: upcycling, expert layouts.")
data = typer.Typer(no_args_is_help=True, help="Look at data files.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)
    app.command()(plan)
    app.command()(export)
    app.add_typer(convert, name="convert")
    app.add_typer(data, name="data")


def doctor(as_json: AsJson = False) -> None:
    """Versions, compilers, devices and backends of this machine; what is missing and how to get it."""
    from prism_fast.doctor import examine, healthy

    checks = examine()
    well = healthy(checks)
    if as_json:
        print(json.dumps({"healthy": well, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        _show_checks(checks)
        console.print("[green]everything that is needed here works[/]" if well else "[bold red]something is broken[/]")
    raise typer.Exit(0 if well else 1)


def _show_checks(checks: list[Check]) -> None:
    table = Table()
    for name in ("part", "name", "state", "found", "wanted"):
        table.add_column(name, overflow="fold", no_wrap=name in ("name", "state"))
    group = None
    for check in checks:
        if group not in (None, check.group):
            table.add_section()
        first, group = check.group != group, check.group
        state = f"[{STYLES[check.state]}]{check.state}[/]"
        table.add_row(check.group if first else "", check.name, state, *map(_plain, (check.found, check.wanted)))
    console.print(table)
    for check in checks:
        if check.state != "ok" and check.cure:
            console.print(f"{check.name}: {check.cure}", style=STYLES[check.state], markup=False, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt, images expanded (`data check --policy` measures them).")
    ] = None,
    image_tokens: Annotated[int | None, typer.Option(help="How many of them come from images; default half.")] = None,
    card: Annotated[str | None, typer.Option(help="Say whether it fits on a100 (80 GB), h100, h200 or b200.")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, memory by component and tokens per step of a recipe, before anything is loaded."""
    from prism_fast.config import load_config
    from prism_fast.plan import make_plan, render

    lengths = {"prompt_tokens": prompt_tokens, "image_tokens": image_tokens}
    made = make_plan(load_config(recipe, overrides or []), **lengths, card=card)
    if as_json:
        print(made.as_json())
    else:
        console.print(render(made), highlight=False)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/<stage>-<step>.")],
    destination: Destination,
    model: Annotated[
        str | None, typer.Option(help="policy or discriminator; default: the policy if it has one.")
    ] = None,
) -> None:
    """Write the model of a run's checkpoint as a folder that transformers and vLLM load."""
    from prism_fast.train.export import MODELS, export_checkpoint

    if model not in (None, *MODELS):
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}", param_hint="--model")
    export_checkpoint(checkpoint, destination, model)
    _done(destination)


@convert.command()
def upcycle(
    source: Source,
    destination: Destination,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    noise_std: Annotated[float, typer.Option(help="Deviation of the noise on each expert.")] = 0.01,
    router_std: Annotated[float, typer.Option(help="Deviation of the routers.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Decides noise, routers and score head.")] = 1,
) -> None:
    """Dense policy folder to discriminator folder: experts, routers and a score head, in the released layout."""
    from transformers.utils.logging import disable_progress_bar

    from prism_fast.models.convert import upcycle_folder

    disable_progress_bar()
    upcycle_folder(
        source,
        destination,
        num_experts=experts,
        top_k=top_k,
        noise_std=noise_std,
        router_std=router_std,
        seed=seed,
    )
    _done(destination)


@convert.command("to-released")
def convert_to_released(source: Source, destination: Destination) -> None:
    """Discriminator with experts as transformers 5 saves them to the layout of released checkpoints."""
    from prism_fast.models.convert import to_released

    to_released(source, destination)
    _done(destination)


@convert.command("from-released")
def convert_from_released(source: Source, destination: Destination) -> None:
    """Discriminator in the layout of released checkpoints to experts as transformers 5 saves them."""
    from prism_fast.models.convert import from_released

    from_released(source, destination)
    _done(destination)


def _done(folder: Path) -> None:
    console.print(f"written: {folder}", highlight=False, soft_wrap=True)


Column = Annotated[
    list[str] | None, typer.Option("--column", help="OUR=THEIR name of a field, as data.columns of a run; repeatable.")
]
ImageRoot = Annotated[Path | None, typer.Option(help="Where relative image paths begin, as data.image_root.")]
SystemPrompt = Annotated[str | None, typer.Option(help="As data.system_prompt: published, a text, or a file.")]


def _settings(
    column: list[str] | None, image_root: Path | None, prompt: str | None, wanted: Wanted, max_image_pixels: int | None
) -> Settings:
    from prism_fast.config import DataConfig
    from prism_fast.data.entries import check_columns
    from prism_fast.data.parsing import Settings
    from prism_fast.data.system_prompt import system_prompt

    columns = {}
    for mapped in column or ():
        ours, separator, theirs = mapped.partition("=")
        if not separator:
            raise typer.BadParameter(f"{mapped!r} is not OUR=THEIR, e.g. problem=question", param_hint="--column")
        columns[ours] = theirs
    try:
        check_columns(columns, "--column")
        text = system_prompt(prompt)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    pixels = DataConfig().max_image_pixels if max_image_pixels is None else max_image_pixels
    return Settings(wanted, columns, image_root, text, pixels)


@data.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="JSON, JSON lines, parquet or Arrow; folders, globs, hub names.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help="demonstrations, tasks or pairs, where the first row does not tell.")
    ] = None,
    require_teacher: Annotated[bool, typer.Option(help="Tasks must have teacher columns (alignment).")] = False,
    data_source: Annotated[
        list[str] | None, typer.Option(help="Accept tasks of this data_source too: reward.functions grades it.")
    ] = None,
    max_image_pixels: Annotated[int | None, typer.Option(help="Refuse larger images.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Measure prompts with the processor of this folder.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="As data.max_pixels of the run; needs --policy.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Report longer prompts; needs --policy.")] = None,
    column: Column = None,
    image_root: ImageRoot = None,
    system_prompt: SystemPrompt = None,
    as_json: AsJson = False,
) -> None:
    """Report every problem of data files with file, row and field. Exit code 1 if there are any."""
    from rich.progress import Progress

    from prism_fast.data.check import check_file
    from prism_fast.data.formats import ROLES
    from prism_fast.data.parsing import Wanted
    from prism_fast.rewards import known_sources

    if file_format is not None and file_format not in ROLES:
        raise typer.BadParameter(f"{file_format!r} is not one of {', '.join(ROLES)}", param_hint="--format")
    if max_pixels is not None and policy is None:
        raise typer.BadParameter("needs --policy: each model makes tokens of its own", param_hint="--max-pixels")
    processor = None if policy is None else _processor(policy, max_pixels)
    wanted = Wanted(require_teacher, (*known_sources(judge=True), *(data_source or ())))
    settings = _settings(column, image_root, system_prompt, wanted, max_image_pixels)
    findings = []
    with Progress(console=Console(stderr=True), transient=True) as bars:  # nothing is drawn where no one looks
        for path in paths:
            bar = bars.add_task(path.name, total=None)
            findings.append(
                check_file(
                    path,
                    format=file_format,
                    settings=settings,
                    processor=processor,
                    max_prompt_tokens=max_prompt_tokens,
                    own_sources=data_source or (),
                    progress=lambda done, total, bar=bar: bars.update(bar, completed=done, total=total),
                )
            )
    for finding in findings:
        _note_unearnable(finding)
    if as_json:
        print(json.dumps([_as_plain(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            _show_findings(finding)
    raise typer.Exit(1 if any(finding.problems for finding in findings) else 0)


@data.command()
def preview(
    path: Annotated[Path, typer.Argument(help="A data file that `data check` reads.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: FILE-preview.html in this folder.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many, evenly spaced from the first to the last.")] = 8,
    policy: Annotated[Path | None, typer.Option(help="Count tokens with the processor of this folder.")] = None,
    file_format: Annotated[str | None, typer.Option("--format", help="As for `data check`.")] = None,
    column: Column = None,
    image_root: ImageRoot = None,
    system_prompt: SystemPrompt = None,
) -> None:
    """Write a page with some samples of a data file: turns, images, texts with their spans, as training reads them."""
    from prism_fast.data.formats import ROLES, open_samples, role_of
    from prism_fast.data.parsing import Wanted
    from prism_fast.report.preview import write_preview

    if file_format is not None and file_format not in ROLES:
        raise typer.BadParameter(f"{file_format!r} is not one of {', '.join(ROLES)}", param_hint="--format")
    settings = _settings(column, image_root, system_prompt, Wanted(), None)
    form = role_of(path, settings.columns) if file_format is None else file_format
    opened = open_samples(path, form, settings)
    page = Path(f"{path.stem}-preview.html") if out is None else out
    processor = None if policy is None else _processor(policy)
    count = write_preview(opened, page, count=samples, processor=processor)
    console.print(f"written: {page} ({count} of {len(opened)} samples)", markup=False, highlight=False, soft_wrap=True)


def _processor(folder: Path, max_pixels: int | None = None) -> Processor:
    from prism_fast.models.processor import Processor

    return Processor.from_pretrained(folder, max_pixels=max_pixels)


def _note_unearnable(findings: Findings) -> None:
    """Add a note on tasks whose ground truth is no right answer to its own question."""
    from prism_fast.rewards import AnswerChecker
    from prism_fast.rewards.earnable import unearnable

    if findings.form != "tasks" or findings.usable is None:
        return
    with AnswerChecker() as checker:
        wrong = unearnable(findings.usable, checker)
    if wrong:
        places = _first([findings.usable.place(index) for index in wrong])
        findings.notes.append(
            f"{len(wrong):,} rows ({places}) can earn no reward: their ground truth is not accepted as an answer to "
            "itself. Give the final answer alone, as a number, a formula, a choice or words"
        )


def _first(places: list[Place]) -> str:
    """The rows of the first three places."""
    return ", ".join(place.row for place in places[:3]) + (", …" if len(places) > 3 else "")


def _as_plain(findings: Findings) -> dict[str, object]:
    from prism_fast.data.problems import by_kind

    return {
        "path": str(findings.path),
        "form": findings.form,
        "good": findings.samples,
        "problems": [str(problem) for problem in findings.problems],
        "notes": findings.notes,
        "kinds": [
            {"count": len(alike), "first": str(alike[0]), "rows": [problem.place.row for problem in alike]}
            for alike in by_kind(findings.problems)
        ],
        "prompt_tokens": _lengths(findings.prompt_tokens),
        "text_tokens": {field: _lengths(lengths) for field, lengths in findings.text_tokens.items()},
    }


_PERCENTILES = (50, 90, 99)
_MAX_KINDS = 20


def _lengths(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    import numpy as np

    found = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").tolist()
    percentiles = {f"p{share}": int(value) for share, value in zip(_PERCENTILES, found, strict=True)}
    return {"mean": sum(lengths) / len(lengths), **percentiles, "max": max(lengths)}


def _show_findings(findings: Findings) -> None:
    from prism_fast.data.problems import by_kind

    def show(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    show(f"{findings.path}: {findings.form}, {findings.samples} good, {len(findings.problems)} problem(s)")
    for field, lengths in {"prompt": findings.prompt_tokens, **findings.text_tokens}.items():
        if found := _lengths(lengths):
            percentiles = ", ".join(f"{found[f'p{share}']} ({share} %)" for share in _PERCENTILES)
            show(f"  {field}: {found['mean']:.0f} tokens on average; {percentiles}, {found['max']} at most")
    for note in findings.notes:
        show(f"  {note}", "yellow")
    kinds = by_kind(findings.problems)
    for alike in kinds[:_MAX_KINDS]:
        if len(alike) == 1:
            show(f"  {alike[0]}", "red")
            continue
        places = _first([problem.place for problem in alike])
        show(f"  {len(alike)} rows ({places}): {alike[0].about}", "red")
    if len(kinds) > _MAX_KINDS:
        left = sum(map(len, kinds[_MAX_KINDS:]))
        show(f"  and {left} problem(s) of {len(kinds) - _MAX_KINDS} other kinds; --json lists them all", "red")
