"""The programs of `examples/`, as they are."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"
HEAD = """# Examples

Short programs that run on a CPU in seconds, in `examples/` of a checkout. A test runs each, but for the one for verl:
verl does not install beside the transformers used here, so that one is parsed, and the losses that it names are
compared by `make verl-parity`.
"""


def page() -> str:
    """The Markdown page."""
    lines = [HEAD]
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text()
        first = ast.get_docstring(ast.parse(source)).splitlines()[0]
        lines += [f"## {path.name}", "", first, "", "```python", source.rstrip(), "```", ""]
    for path in sorted(FOLDER.glob("*.yaml")):
        lines += [f"## {path.name}", "", "```yaml", path.read_text().rstrip(), "```", ""]
    return "\n".join(lines)
