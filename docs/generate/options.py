"""The option reference: every key of a recipe, from the dataclasses of the configuration and the comments beside their
fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from docs.generate.text import inline
from prism_fast.config import Config


class Option(NamedTuple):
    """``key``: its dotted name; ``section``: what stands before the last dot; ``meaning``: the comment, in Markdown."""

    key: str
    section: str
    type: str
    default: str
    meaning: str


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment lines directly above it and the comment behind it, as one text."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, at = [], node.lineno - 2
        while at >= 0 and lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip().removeprefix("#").strip())
            at -= 1
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip().removeprefix("#").strip()
        found[node.target.id] = " ".join(filter(None, (*above, behind)))
    return found


def spelled(kind: Any) -> str:
    """A type in the words of a recipe."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(spelled(part) for part in parts)
    if origin is tuple:
        return f"list of {len(parts)} numbers" if parts[-1] is not Ellipsis else f"list of {spelled(parts[0])}"
    if origin is list:
        return f"list of {spelled(parts[0])}"
    if origin is dict:
        return "mapping"
    if kind is Any:
        return "see the text"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", types.NoneType: "`null`"}
    return names[kind]


def shown(value: Any) -> str:
    """A default as a recipe writes it."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`"


def sections(config: Any = None, prefix: str = "") -> Iterator[tuple[str, type, list[Option]]]:
    """(dotted name, class, options) of every section, the whole configuration first."""
    config = Config() if config is None else config
    hints, texts = get_type_hints(type(config)), comments(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}
    yield (
        prefix,
        type(config),
        [
            Option(f"{prefix}.{name}".lstrip("."), prefix, spelled(hints[name]), shown(value), inline(texts[name]))
            for name, value in plain.items()
        ],
    )
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{prefix}.{name}".lstrip("."))


def page() -> str:
    """The Markdown page."""
    lines = [
        "# Options",
        "",
        "Every key of a recipe, with its type, its default and its meaning. A recipe holds what differs from the",
        "defaults, in YAML; the command line takes the same keys as `key.sub=value`. Unknown keys, wrong types and",
        "values out of range are errors that name the key and what is allowed. The resolved configuration of a run is",
        "its `config.yaml`. Made from the configuration's source when this page is built.",
    ]
    for name, cls, options in sections():
        text = inspect.getdoc(cls) or ""
        lines += ["", f"## `{name}`" if name else "## Top level", ""]
        if text and not text.startswith(f"{cls.__name__}("):  # dataclasses write their signature where nothing stands
            lines += [inline(text), ""]
        if options:
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{o.key}` | {o.type} | {o.default} | {o.meaning.replace('|', '&#124;')} |" for o in options]
    return "\n".join(lines) + "\n"
