"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from docs.generate.text import inline
from prism_fast.cli import app


def commands(command: Any = None, path: str = "prism-fast") -> Iterator[tuple[str, Any]]:
    """(words of the call, command) of every command that does something."""
    command = typer.main.get_command(app) if command is None else command
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def page() -> str:
    """The Markdown page."""
    lines = ["# Commands", "", "`prism-fast COMMAND --help` shows the same.", ""]
    for path, command in commands():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        words = [path, *(_word(argument) for argument in arguments), "[OPTIONS]" if options else ""]
        lines += [f"## {path}", "", "```", " ".join(filter(None, words)), "```", ""]
        lines += [inline(inspect.cleandoc(command.help or "")), ""]
        if arguments or options:
            lines += ["| | |", "|---|---|"]
        lines += [f"| `{_word(a)}` | {_text(a)} |" for a in arguments]
        lines += [f"| `{', '.join((*o.opts, *o.secondary_opts))}` | {_text(o)} |" for o in options]
        lines += [""]
    return "\n".join(lines) + "\n"


def _word(argument: Any) -> str:
    name = argument.name.upper()
    name = f"{name}..." if argument.nargs != 1 else name
    return name if argument.required else f"[{name}]"


def _text(parameter: Any) -> str:
    text = inline(parameter.help or "")
    default = parameter.default
    if default is not None and default is not False and not callable(default) and default != ():
        text += f" Default: `{default}`."
    return text.replace("|", "&#124;")
