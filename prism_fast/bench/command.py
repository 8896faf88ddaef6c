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

app = typer.Typer(help="Benchmarks; none of their numbers comes without a check in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `ops` a subcommand while it is the only one."""


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

    kind = "cpu" if cpu else device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"--device {kind}: use cpu, or cuda on a machine that has one")
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


def _worst(row: Row) -> str:
    errors = asdict(row)["errors"] or {}
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
