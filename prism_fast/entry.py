"""The installed command. It starts where only the ops are installed, to say what the trainer needs."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from prism_fast.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "prism_fast").startswith("prism_fast"):  # a defect of ours, not a missing package
            raise
        sys.exit(
            f"error: the prism-fast command needs the packages of the extra 'train'; {error.name} is missing.\n"
            "Install them: pip install 'prism-fast[train]' (in a checkout: pip install -e '.[train]').\n"
            "The ops alone (from prism_fast import ops) need torch and nothing else."
        )
    run()
