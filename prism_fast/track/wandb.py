"""Weights & Biases: a view; needs the extra ``wandb``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Wandb:
    """One W&B run per run directory. Its files are in ``<run directory>/wandb``."""

    name = "Weights & Biases"

    def __init__(self, folder: Path, *, project: str, mode: str, run_id: str, config: Mapping[str, Any]):
        """``run_id``: an existing run of this id is resumed. ``mode``: online, or offline for ``wandb sync`` later.

        Raises:
            ValueError: W&B refuses to begin a run (not logged in, not reached).
        """
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                id=run_id,
                resume="allow" if mode == "online" else None,  # offline, the later sync joins runs of one id
                mode=mode,
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(console="off"),  # the console is the run's own
            )
        except Exception as error:
            raise ValueError(
                f"track.wandb.project={project}: no run could be begun ({error}); log in (`wandb login`), give "
                "track.wandb.mode=offline, or track.wandb.project=null"
            ) from error
        # W&B's own step accepts no second line at an old step; ours is a metric, the x axis of all others.
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def show(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log({"global_step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
