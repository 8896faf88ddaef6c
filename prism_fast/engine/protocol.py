"""The contract of engines; ``tests/contracts/engine.py`` checks whether an engine keeps it.

An engine owns the weights of one model while it learns: their masters, gradients and optimizer. One step is::

    for each micro-batch:
        loss = engine.run(lambda: ...)      # every weight is read in there
        engine.backward(loss, logp=logp)
    update = engine.step()                  # or engine.discard()

Ranks: all ranks call a method marked *joint*, in the same order; between two joint calls a rank makes as many other
calls as its own data need (not where ``lockstep`` is set). Losses are divided by denominators of the whole step over
all ranks, so an engine adds up gradients and never scales them: any cut into micro-batches, and any number of ranks,
gives the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Update(NamedTuple):
    """Norm of the whole gradient before clipping, and learning rate of one update."""

    grad_norm: float
    lr: float


class Engine(Protocol):
    """Attributes:

    module: the model, as it was built. Read its weights only inside :meth:`run`; outside they may be empty shards.
    root: the module that :meth:`run` calls; it holds ``module`` and carries the hooks of sharding.
    ranks: how many processes learn together.
    lockstep: whether :meth:`run` and :meth:`backward` are joint as well, because weights are gathered within them. All
        ranks then make as many passes, each through the same modules: trainers repeat a micro-batch with weight 0, let
        each encode an image (``train.layouts``), and do not repeat a step that ran out of memory.
    updates: optimizer steps so far, those before a resume included.
    where: stage and step, for errors.
    packing_checked: whether ``train.self_check`` has compared packed with unshared rows, which it notes here. It reads
        weights and gradients outside of :meth:`run`: an engine that shards them says True from the start.
    """

    module: nn.Module
    root: nn.Module
    ranks: int
    lockstep: bool
    updates: int
    where: str
    packing_checked: bool

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn()`` within a forward of ``root``: every weight that ``fn`` reads is whole there."""

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        """Add the gradient of ``loss`` (0-d) to that of the step, unscaled, any number of times per step. Does not
        synchronise the host: :meth:`verify` checks whether the loss and the tensors it is ``made_of`` (any shapes) are
        finite.
        """

    def verify(self) -> None:
        """Joint. Check everything that :meth:`backward` got since the last check.

        Raises:
            NonFiniteError: a tensor holds a NaN or an infinity, on any rank; the error names tensor and micro-batch.
                The gradients are dropped, the weights are untouched.
        """

    def step(self) -> Update:
        """Joint. :meth:`verify`, clip the gradient to ``clip_norm``, update, clear the gradients.

        A parameter without a gradient is not updated. The learning rate is that of update ``updates`` (from 0): linear
        warm-up ((t + 1) / warmup, never 0), then the schedule.

        Raises:
            NonFiniteError: as `verify`, or the gradient's norm is NaN or infinite; the error names parameters. The
                gradients are dropped, the weights are untouched.
        """

    def discard(self) -> None:
        """Drop the accumulated gradients, and the tensors that `verify` would check, without an update."""

    def agree(self, flag: bool) -> bool:
        """Joint. Whether ``flag`` is true on every rank."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Joint. Sum over the ranks of each of ``values``; float64."""

    def max(self, values: Sequence[float]) -> list[float]:
        """Joint. Largest of each of ``values`` over the ranks; float64."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Joint until exhausted. All parameters of ``module`` by name, whole and detached, in the dtype of the forward:
        for exports, rollout engines and upcycling. Parameters of one layer are neighbours. A tied parameter comes once,
        by its first name. Adapters (``models.lora``) are merged into the weights that they belong to.

        A tensor may be the weight itself: do not write to it, and copy it if it must outlive the next one.
        """

    def save(self, folder: Path) -> None:
        """Joint. Write weights (masters where there are any), moments and ``updates`` into ``folder``, which exists.
        After :meth:`load` training continues with the same bits. Gradients are not saved.

        Raises:
            DiskFullError: there is no room.
        """

    def load(self, folder: Path) -> None:
        """Joint. Restore the state that :meth:`save` wrote; gradients are dropped.

        Raises:
            ValueError: a weight is missing, has another shape, or is not the model's.
        """

    def offload(self) -> None:
        """Move masters, moments and gradients to the CPU, so that a rollout engine has their memory. The weights of
        :meth:`named_weights` stay. Until :meth:`reload`, call only :meth:`named_weights`, :meth:`run` and
        :meth:`save`."""

    def reload(self) -> None:
        """Undo :meth:`offload`."""

    def close(self) -> None:
        """Give back the memory. The engine cannot be used any more, nor the module where the engine holds its weights
        (``train.engines.keeps_weights``)."""
