"""Progress bars with the main metrics of a running stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINES_WITHOUT_TERMINAL = 10  # a stage prints about so many lines into a log file


class Bar:
    """The bar of one stage; ``advance`` shows the current metrics."""

    def __init__(self, progress: Progress, name: str, total: int | None, done: int):
        self._progress, self._name, self._total, self._done = progress, name, total, done
        self._before, self._started = done, time.monotonic()
        self._task = progress.rich.add_task(name, total=total, completed=done, metrics="")

    def advance(self, **metrics: float | int | None) -> None:
        self._done += 1
        text = "  ".join(
            f"{key.replace('_', ' ')} {_short(value)}" for key, value in metrics.items() if value is not None
        )
        self._progress.rich.update(self._task, advance=1, metrics=text)
        if not self._progress.console.is_terminal:
            every = max(1, (self._total or 500) // LINES_WITHOUT_TERMINAL)
            if self._done % every == 0 or self._done == self._total:
                of = f"/{self._total}" if self._total else ""
                line = f"{time.strftime('%H:%M:%S')} {self._name} {self._done}{of}  {self._times()}  {text}"
                self._progress.console.print(line, highlight=False, soft_wrap=True)

    def _times(self) -> str:
        """Since this process began the stage, and until its end at the same pace."""
        spent = time.monotonic() - self._started
        shown = f"after {_duration(spent)}"
        if self._total is None or self._done == self._total:
            return shown
        return f"{shown}, {_duration(spent / (self._done - self._before) * (self._total - self._done))} left"

    def finish(self) -> None:
        self._progress.rich.update(self._task, total=self._done)
        self._progress.rich.stop_task(self._task)


class Progress:
    """The bars of a run; on a log file instead of a terminal, a few lines per stage."""

    def __init__(self, console: Console):
        self.console = console
        self.rich = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.rich.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.rich.__exit__(*error)

    @contextmanager
    def bar(self, name: str, total: int | None, *, done: int = 0) -> Iterator[Bar]:
        bar = Bar(self, name, total, done)
        yield bar
        bar.finish()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
