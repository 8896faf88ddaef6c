"""The recipes that ship with the package, as they are."""

from __future__ import annotations

from importlib import resources

from prism_fast.config import shipped_recipes

HEAD = """# Recipes

A recipe is a YAML file that holds what differs from the [defaults](options.md). `prism-fast run NAME` takes one of
these by its name, or the path of a file of yours; `key.sub=value` behind it changes single keys.

| recipe | hardware |
|---|---|
| `digits` | any machine, two CPU cores are enough ([what was measured](../results.md#the-demo)) |
| `rlvr_grpo`, `rlvr_dapo`, `rlvr_gspo` | one GPU; `prism-fast plan RECIPE --card h200` computes its memory |

The RLVR recipes have the published settings, and need `model.policy=PATH` and `data.rlvr=PATH`. They have not been run
on a GPU yet. A recipe of the published alignment is not there yet. `prism-fast run RECIPE --dry-run` makes the checks
of a run and shows its memory without writing anything.
"""


def page() -> str:
    """The Markdown page."""
    lines = [HEAD]
    for name in shipped_recipes():
        text = resources.files("prism_fast.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        lines += [f"## {name}", "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(lines)
