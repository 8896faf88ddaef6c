"""What every engine takes, gives and promises. ``tests/contracts/engine.py`` holds an engine to it.

An engine owns the weights of one model while it learns: their masters, gradients and optimizer. One step is::

    for each micro-batch:
        loss = engine.run(lambda: ...)      # every weight is read in there
        engine.backward(loss, logp=logp)
    update = engine.step()                  # or engine.discard()

Ranks: a method marked *joint* is called by all ranks, in the same order; between two joint calls a rank does what its
own data ask for. Losses are divided by denominators of the whole step over all ranks, so an engine adds gradients up
and never scales: any cut into micro-batches, and any number of ranks, gives the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Update(NamedTuple):
    """Of one update: norm of the whole gradient before clipping, and the learning rate it was made with."""

    grad_norm: float
    lr: float


class Engine(Protocol):
    """Attributes:

    module: the model, as it was built. Weights are read inside :meth:`run` alone; outside they may be empty shards.
    root: the module that :meth:`run` calls, with ``module`` inside. Hooks of sharding are on it.
    updates: optimizer steps so far, of this run and of those it goes on from.
    where: stage and step, for errors.
    """

    module: nn.Module
    root: nn.Module
    updates: int
    where: str

    def run(self, fn: Callable[[], T]) -> T:
        """``fn()`` within a forward of ``root``. What ``fn`` reads (weights, also as attributes) is whole in there."""

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        """Add a loss's gradient (0-d) to those of the step, unscaled. Does not synchronise the host: whether the loss
        and what it was ``made_of`` (any shapes) are finite is looked at by :meth:`verify`.

        A loss may also be one that a later part of the same graph needs (a cut group's features): nothing about it is
        divided, and it may come any number of times per step.
        """

    def verify(self) -> None:
        """Joint. Look once at everything that :meth:`backward` saw since the last look.

        Raises:
            NonFiniteError: something is NaN or infinite, on any rank; it names what and which micro-batch. The
                gradients are dropped, the weights are untouched.
        """

    def step(self) -> Update:
        """Joint. :meth:`verify`, clip the gradient to ``clip_norm``, update, clear the gradients.

        A parameter without a gradient stays as it is. The learning rate is that of update ``updates`` (from 0): linear
        warm-up ((t + 1) / warmup, never 0), then the schedule.

        Raises:
            NonFiniteError: as `verify`, or the gradient's norm is NaN or infinite; it names parameters. The gradients
                are dropped, the weights are untouched.
        """

    def discard(self) -> None:
        """Drop the accumulated gradients without an update, and what `verify` would have looked at."""

    def agree(self, flag: bool) -> bool:
        """Joint. Whether ``flag`` is true on every rank."""

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Joint. Sums over the ranks, place by place; float64."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Joint, to the end. Every parameter of ``module`` by name, whole and detached, in the dtype it is computed
        with: what is exported, pushed to a rollout engine, and read by upcycling. A layer's parameters follow each
        other. A tied parameter comes once, by its first name.

        A tensor may be the weight itself: copy what must outlive the next one, and do not write to it.
        """

    def save(self, folder: Path) -> None:
        """Joint. Write weights (masters where there are any), moments and ``updates`` into ``folder``, which exists.
        The bits of :meth:`load` go on as if nothing had been in between. Gradients are not saved.

        Raises:
            DiskFullError: there is no room.
        """

    def load(self, folder: Path) -> None:
        """Joint. Take back what :meth:`save` wrote; gradients are dropped.

        Raises:
            ValueError: a weight is missing or has another shape.
        """

    def offload(self) -> None:
        """Move masters, moments and gradients to the CPU, so that a rollout engine has their memory. The weights that
        :meth:`named_weights` gives stay. Until :meth:`reload`, nothing else but these two and :meth:`run` is called."""

    def reload(self) -> None:
        """Undo :meth:`offload`."""
