"""The page on semantics: the text of `semantics.md` in this folder with the settings and the lists of differences."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from docs.generate.text import inline
from prism_fast.algorithms import semantics
from prism_fast.algorithms.semantics import SEMANTICS, Semantics
from prism_fast.data import framing

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("prism_fast", "released", "paper")


def meanings() -> dict[str, str]:
    """Field of `Semantics` -> its meaning, from the docstring."""
    found = {}
    for names, text in re.findall(r"((?:``\w+``(?:, )?)+): (.*?)(?=\n``|\Z)", inspect.getdoc(Semantics), re.DOTALL):
        for name in re.findall(r"\w+", names):
            found[name] = " ".join(text.split())
    return found


def faults() -> dict[int, str]:
    """The known faults of the published code that the default mends, from the tests that show each one."""
    tree = ast.parse((ROOT / "tests" / "test_published_fixes.py").read_text())
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "FAULTS"]
    return ast.literal_eval(value)


def page() -> str:
    """The Markdown page."""
    text = (ROOT / "docs" / "generate" / "semantics.md").read_text()
    rows = ["| setting | prism_fast | released | paper | meaning |", "|---|---|---|---|---|"]
    meaning = meanings()
    for field in dataclasses.fields(Semantics):
        if field.name != "differs":
            values = [f"`{_shown(getattr(SEMANTICS[name], field.name))}`" for name in NAMES]
            rows.append(f"| `{field.name}` | {' | '.join(values)} | {inline(meaning[field.name])} |")
    parts = {
        "SETTINGS": "\n".join(rows),
        "DIFFERS": "\n".join(f"- {inline(line)}" for line in SEMANTICS["released"].differs),
        "FAULTS": "\n".join(f"{number}. {inline(line)}" for number, line in faults().items()),
        "FRAMES": inline(inspect.getdoc(framing)),
        "ABOUT": inline(inspect.getdoc(semantics)),
    }
    for name, content in parts.items():
        assert text.count(f"{{{{ {name} }}}}") == 1, name
        text = text.replace(f"{{{{ {name} }}}}", content)
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else value
