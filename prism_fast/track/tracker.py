"""Where a run's metrics go: the record first, then every view of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prism_fast.models.writing import write_whole
from prism_fast.track.jsonl import Record, Value
from prism_fast.track.tensorboard import TensorBoard
from prism_fast.track.view import NOTES, GlobalStep, View, tagged


class Tracker:
    """Writes lines to ``metrics.jsonl`` and shows their metrics in TensorBoard and in further views.

    Keys that begin with a prefix of :data:`prism_fast.track.metrics.WALL_CLOCK` depend on the machine's clock and
    memory; the rest is equal, bit for bit, for equal seeds on one machine. A metric without a value in a step is absent
    from the line: no placeholders.

    A view that fails does not end the run: its first failure is reported, and the next line is shown to it again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_bytes: int = 0,
        views: Sequence[View] = (),
        tell: Callable[[str], None] = print,
    ):
        """
        Args:
            keep_bytes: bytes of ``metrics.jsonl`` that a resumed run keeps. Later lines are written again: TensorBoard
                drops the old ones; the further ``views`` cannot, so they do not get them a second time.
            tell: called with a message when a view fails.

        Raises:
            RecordError: the file is shorter than that, or a line of it is not JSON.
        """
        self._record = Record(folder, keep_bytes=keep_bytes)
        self._step, self._tell, self._told = GlobalStep(), tell, set[str]()
        self._again, self._views = self._record.dropped, tuple(views)
        newest: list[dict] = []  # lines at the last step: a purge drops whole steps, so these are shown again
        for line in self._record.lines():
            before, at = self._step.value, self._step.advance(line["stage"], line["step"])
            newest = [*(newest if at == before else ()), line]
        self._board = TensorBoard(folder, purge_from=self.step)
        for line in newest:
            self._show(self._board, line)

    @property
    def path(self) -> Path:
        return self._record.path

    @property
    def step(self) -> int:
        """Training steps of all stages so far: the last one whose metrics were written."""
        return self._step.value

    def size(self) -> int:
        """Bytes of the record."""
        return self._record.size()

    def write(self, stage: str, step: int, values: Mapping[str, Value]) -> None:
        """Add a line.

        Raises:
            ValueError: a value is not finite.
            DiskFullError: no room for it; the lines before it stay, and no part of it is left.
        """
        line = self._record.append(stage, step, values)
        self._step.advance(stage, step)
        self._show(self._board, line)
        if self._again:
            self._again -= 1
            return
        for view in self._views:
            self._show(view, line)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for view in (self._board, *self._views):
            self._try(view, lambda view=view: view.close(failed=kind is not None), "the end of the run")

    def _show(self, view: View, line: Mapping[str, int | float | str]) -> None:
        values = {} if line["stage"] in NOTES else tagged(line)
        if values:
            what = f"the metrics of {line['stage']} step {line['step']}"
            self._try(view, lambda: view.show(self.step, values), what)

    def _try(self, view: View, act: Callable[[], None], what: str) -> None:
        try:
            act()
        except Exception as error:
            if view.name not in self._told:
                self._told.add(view.name)
                self._tell(
                    f"{view.name} did not take {what} ({type(error).__name__}: {error}). The run goes on and "
                    f"{self.path.name} has everything; further failures of it are not told"
                )


class Untracked:
    """In place of a :class:`Tracker` on the ranks that write nothing."""

    step = 0

    def size(self) -> int:
        return 0

    def write(self, stage: str, step: int, values: Mapping[str, Value]) -> None: ...

    def __enter__(self) -> Untracked:
        return self

    def __exit__(self, *error: object) -> None: ...


def require_packages(*, wandb: bool, trackio: bool) -> None:
    """Refuse views whose package is not installed.

    Raises:
        ValueError: names the key, the package and the extra that brings it.
    """
    for name, asked in (("wandb", wandb), ("trackio", trackio)):
        if asked and find_spec(name) is None:
            raise ValueError(
                f"track.{name}.project is given, but the package {name} is not installed: install prism-fast[{name}], "
                f"or give track.{name}.project=null"
            )


def open_views(
    folder: Path, *, wandb: str | None, wandb_mode: str, trackio: str | None, config: Mapping[str, Any]
) -> list[View]:
    """The views beside TensorBoard: those with the name of a project.

    Args:
        config: the run's resolved configuration, which the views show.

    Raises:
        ValueError: a package is missing, or no run could be begun in the project.
    """
    require_packages(wandb=wandb is not None, trackio=trackio is not None)
    views: list[View] = []
    if wandb is not None:
        from prism_fast.track.wandb import Wandb

        views.append(Wandb(folder, project=wandb, mode=wandb_mode, run_id=_run_id(folder), config=config))
    if trackio is not None:
        from prism_fast.track.trackio import Trackio

        views.append(Trackio(folder, project=trackio, run_id=_run_id(folder), config=config))
    return views


def _run_id(folder: Path) -> str:
    """The run's name in views, the same after a resume."""
    path = folder / "run_id"
    if not path.exists():
        write_whole(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")
