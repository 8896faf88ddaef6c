"""trackio: a view on this machine or on a Hugging Face Space, for those who have the extra ``trackio``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackio:
    """One trackio run per run directory, in trackio's own place (its ``TRACKIO_DIR``, ``TRACKIO_SPACE_ID`` count)."""

    name = "trackio"

    def __init__(self, folder: Path, *, project: str, run_id: str, config: Mapping[str, Any]):
        """``run_id`` is a part of the run's name, by which trackio finds it again.

        Raises:
            ValueError: trackio does not begin a run.
        """
        import trackio

        name = f"{folder.resolve().name}-{run_id}"
        try:
            self._run = trackio.init(project=project, name=name, resume="allow", config=dict(config), embed=False)
        except Exception as error:
            raise ValueError(
                f"track.trackio.project={project}: no run could be begun ({error}); give another project or null"
            ) from error

    def show(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        import trackio

        trackio.finish()  # the run and what trackio would do about it when the process ends
