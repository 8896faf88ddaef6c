"""``prism-fast bench``."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from prism_fast.bench.ops.op import Row
    from prism_fast.bench.step.measure import Row as StepRow
    from prism_fast.bench.train.measure import Row as TrainRow

app = typer.Typer(help="Benchmarks; none of their numbers comes without a check in the same run.", no_args_is_help=True)


@app.command()
def ops(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these ops (part of the name; repeatable).")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only these providers (part of the name).")] = None,
    shape: Annotated[str | None, typer.Option(help="AxBxC instead of the op's shapes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 instead of the op's.")] = None,
    json: Annotated[Path | None, typer.Option(help="Result file, written anew after every shape.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Small shapes on the CPU: the program, not the figures.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="CPU: peak memory too, a process per provider.")] = False,
    seconds: Annotated[float, typer.Option(help="Timed rounds per op and shape; three at least.")] = 3.0,
) -> None:
    """Time the ops beside other implementations and check every result against float64.

    Exit code 1 if a result is wrong; absent and unsupported providers are listed.
    """
    import torch

    from prism_fast.bench.ops import run

    kind = "cpu" if cpu else _device(device)
    if shape is not None and not re.fullmatch(r"\d+(x\d+)+", shape):
        raise typer.BadParameter(f"--shape {shape}: expected numbers joined by x, such as 8192x2560x151936")
    if dtype is not None and dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype {dtype}: expected bfloat16, float16 or float32")
    try:
        rows = run.run(
            device=kind,
            size="small" if cpu else kind,
            ops=op or [],
            providers=provider or [],
            shape=None if shape is None else tuple(map(int, shape.split("x"))),
            dtype=None if dtype is None else getattr(torch, dtype),
            seconds=0.2 if cpu else seconds,
            memory=memory,
            out=json,
            show=Console(width=160, highlight=False, soft_wrap=True).print,
        )
    except run.NothingToDo as error:
        raise typer.BadParameter(str(error)) from None
    wrong = [row for row in rows if row.status == "wrong"]
    for row in {(row.op, row.provider): row for row in wrong}.values():
        typer.echo(f"wrong: {row.op}, {row.provider}, {row.shape}: {row.note} {_worst(row)}", err=True)
    if wrong:
        raise typer.Exit(1)


STEP_EXAMPLES = """Examples:

  prism-fast bench step                                            tiny models, prompt 256, response 256, 16 rollouts

  prism-fast bench step --prompt 256 --response 256 --prompt 512 --response 128 --json step.json        two shapes

  prism-fast bench step --device cuda --depth 8 --checkpointing --prompt 1024 --response 1024 --teacher 768
"""


@app.command(epilog=STEP_EXAMPLES)
def step(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt, image included [256].")] = None,
    response: Annotated[list[int] | None, typer.Option(help="Tokens of a response [256].")] = None,
    teacher: Annotated[list[int] | None, typer.Option(help="Tokens of the teacher's [as the response].")] = None,
    rollouts: Annotated[int, typer.Option(help="Responses to the prompt.")] = 16,
    depth: Annotated[
        int | None,
        typer.Option(help="Layers at the widths of the 4B policy and the 2B x 4 discriminator [cuda 4, cpu: tiny]."),
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed steps of every column, an optimizer update each.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Result file, written anew after every shape.")] = None,
) -> None:
    """Time one alignment step: discriminator scoring, its update, the policy's update.

    Three columns over the same weights and rollouts take turns: the published schedule with stock kernels, the
    published schedule with our kernels, and ours. Scores, losses and every parameter's gradient are compared in
    float32 in the same run; exit code 1 if they differ. Lengths may be repeated, a shape each. On a GPU bfloat16 is
    timed, on the CPU float32.
    """
    import torch

    from prism_fast.bench.step.run import run
    from prism_fast.bench.step.work import Shape

    kind = _device(device)
    if rounds < 1:
        raise typer.BadParameter(f"--rounds must be 1 or more, got {rounds}")
    prompts, responses = prompt or [256], response or [256]
    teachers = teacher or responses
    if not len(prompts) == len(responses) == len(teachers):
        raise typer.BadParameter(
            f"a shape is a prompt, a response and a teacher: got {len(prompts)}, {len(responses)} and {len(teachers)}"
        )
    try:
        shapes = [Shape(*sizes, rollouts) for sizes in zip(prompts, responses, teachers, strict=True)]
        rows = run(
            shapes,
            device=kind,
            depth=4 if depth is None and kind == "cuda" else depth,
            dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
            checkpointing=checkpointing,
            rounds=rounds,
            out=json,
            show=Console(width=220, highlight=False, soft_wrap=True).print,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _fail_if_wrong(rows)


@app.command()
def train(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, image included.")] = 256,
    response: Annotated[int, typer.Option(help="Tokens of a response.")] = 256,
    rollouts: Annotated[int, typer.Option(help="Responses to the prompt.")] = 16,
    depth: Annotated[
        int | None, typer.Option(help="Layers at the widths of the 4B policy [cuda 4, cpu: tiny].")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed updates of every column.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Result file.")] = None,
) -> None:
    """Time the policy's update of GRPO beside TRL's trainer, over the same weights and rollouts.

    Three columns take turns: TRL's GRPOTrainer, the same with our head and loss, and this trainer on packed rows. Loss
    and every parameter's gradient are compared in float32 in the same run; exit code 1 if they differ. On a GPU
    bfloat16 is timed, on the CPU float32. Without TRL its columns are named absent.
    """
    import torch

    from prism_fast.bench.step.work import Shape
    from prism_fast.bench.train.run import run

    kind = _device(device)
    if rounds < 1:
        raise typer.BadParameter(f"--rounds must be 1 or more, got {rounds}")
    try:
        rows = run(
            Shape(prompt, response, response, rollouts),
            device=kind,
            depth=4 if depth is None and kind == "cuda" else depth,
            dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
            rounds=rounds,
            out=json,
            show=Console(width=160, highlight=False, soft_wrap=True).print,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _fail_if_wrong(rows)


def _fail_if_wrong(rows: list[StepRow] | list[TrainRow]) -> None:
    """Exit code 1 if a column's results differ; ``rows`` of `step` or `train`."""
    wrong = [row for row in rows if row.status == "wrong"]
    for row in wrong:
        typer.echo(f"wrong: {row.column}, prompt {row.prompt}, response {row.response}: {row.note}", err=True)
    if wrong:
        raise typer.Exit(1)


def _device(device: str | None) -> str:
    """The device that is asked for, by default cuda where there is one."""
    import torch

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"--device {kind}: use cpu, or cuda on a machine that has one")
    return kind


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Result file (--json) of `bench ops`, `step` or `train`.")],
    after: Annotated[Path, typer.Argument(help="A later one, of the same command on the same machine.")],
) -> None:
    """Compare two results of one machine: times and peaks that grew by more than 5 %.

    Files of different machines or settings are refused. A line whose result, status or amount of work differs is not
    compared. Exit code 1 if anything became slower or larger, or could not be compared.
    """
    from prism_fast.bench.compare import results

    try:
        lines, remarks = results.compare(before, after)
    except results.NotComparable as error:
        raise typer.BadParameter(str(error)) from None
    for text in (*remarks, *results.table(lines)):
        typer.echo(text)
    if any(line.bad for line in lines):
        raise typer.Exit(1)


def _worst(row: Row) -> str:
    errors = asdict(row)["errors"] or {}
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
