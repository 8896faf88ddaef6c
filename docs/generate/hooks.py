"""mkdocs asks here for the pages that are made from sources, and for those that live elsewhere in the project."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Page -> the file of the project that is its one source.
ELSEWHERE = {
    "answers.md": "prism_fast/rewards/ANSWERS.md",
    "grading.md": "prism_fast/rewards/README.md",
    "benchmarks.md": "bench/README.md",
    "unmeasured.md": "bench/UNMEASURED.md",
    "contributing.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config) -> Files:
    """Add the generated pages."""
    from docs.generate import commands, examples, ops, options, recipes, records, semantics

    made = {
        "reference/ops.md": ops.page(),
        "reference/options.md": options.page(),
        "reference/commands.md": commands.page(),
        "reference/recipes.md": recipes.page(),
        "semantics.md": semantics.page(),
        "results.md": records.page(),
        "examples.md": examples.page(),
    }
    made |= {page: (ROOT / source).read_text() for page, source in ELSEWHERE.items()}
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files
