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
| `prism_4b`, `prism_8b` | eight cards, all stages; `torchrun --nproc-per-node 8 -m prism_fast run prism_4b` |
| `prism_4b_lora` | one card of 80 GB; SFT and RLVR of adapters |
| `rlvr_grpo`, `rlvr_dapo`, `rlvr_gspo` | one GPU; `prism-fast plan RECIPE --card h200` computes its memory |

All but `digits` have the published settings, where they do not say otherwise, and need `model.policy=PATH` and the data
of their stages. They have not been run on a GPU yet. `prism-fast run RECIPE --dry-run` makes the checks of a run and
shows its memory without writing anything.
"""


def page() -> str:
    """The Markdown page."""
    lines = [HEAD]
    for name in shipped_recipes():
        text = resources.files("prism_fast.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        lines += [f"## {name}", "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(lines)
