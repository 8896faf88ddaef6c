"""The programs of `examples/`, as they are."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"
HEAD = """# Examples

Short programs. They lie in `examples/` of a checkout.
"""


def page() -> str:
    """The Markdown page."""
    lines = [HEAD]
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text()
        first = ast.get_docstring(ast.parse(source)).splitlines()[0]
        lines += [f"## {path.name}", "", first, "", "```python", source.rstrip(), "```", ""]
    return "\n".join(lines)
