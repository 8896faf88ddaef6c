"""The messages of the project's errors and warnings, as patterns: every string of the sources, with the values that are
put into it left open."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPEN = "…"  # any value


@cache
def messages() -> tuple[str, ...]:
    """Every string of the package and of `setup.py` that has at least four words, values written as `…`."""
    found = set()
    for path in [*sorted((ROOT / "prism_fast").rglob("*.py")), ROOT / "setup.py"]:
        tree = ast.parse(path.read_text())
        loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            text = None if id(node) in loose else _text(node)
            if text is not None and len(text.split()) >= 4:
                found.add(" ".join(text.split()))
    return tuple(sorted(found))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else OPEN for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None


def known(message: str) -> bool:
    """Whether the sources hold ``message``, in which `…` is any value: its pieces lie in one string, in order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split(OPEN)))
    return any(pattern.search(text) for text in messages())
