"""trackio: a view on this machine or on a Hugging Face Space; needs the extra ``trackio``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackio:
    """One trackio run per run directory, stored where trackio's ``TRACKIO_DIR`` or ``TRACKIO_SPACE_ID`` says."""

    name = "trackio"

    def __init__(self, folder: Path, *, project: str, run_id: str, config: Mapping[str, Any]):
        """``run_id``: part of the run's name, by which trackio finds it again.

        Raises:
            ValueError: trackio refuses to begin a run.
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

        trackio.finish()  # also cancels trackio's own hook at the end of the process
