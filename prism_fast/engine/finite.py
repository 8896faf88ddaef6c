"""NaN and infinity are refused by name."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A score, a loss or a gradient is NaN or infinite; this engine's weights are those before the step."""


def refuse_non_finite(where: str, **tensors: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming every tensor that holds a NaN or an infinity, with the first such place."""
    faults = []
    for name, tensor in tensors.items():
        bad = ~tensor.detach().isfinite()
        if count := int(bad.sum()):
            first = bad.nonzero()[0].tolist()
            value = float(tensor.detach()[tuple(first)])
            faults.append(
                f"{name} ({count} of {tensor.numel()}" + (f", first {value} at {first})" if first else f": {value})")
            )
    if faults:
        raise NonFiniteError(f"{where}: not finite: {', '.join(faults)}")


class Seen:
    """The losses of a step and what they were made of; whether all are finite is read once, at :meth:`fault`."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, dict[str, Tensor]]] = []  # per backward: whether all are finite (0-d), and them

    def add(self, loss: Tensor, made_of: dict[str, Tensor]) -> None:
        """Does not synchronise the host."""
        named = {"loss": loss.detach(), **{name: tensor.detach() for name, tensor in made_of.items()}}
        self._seen.append((torch.stack([tensor.isfinite().all() for tensor in named.values()]).all(), named))

    def fault(self, where: str) -> NonFiniteError | None:
        """The error for the first micro-batch that is not finite; if there is none, what was seen is forgotten."""
        finite = torch.stack([flag for flag, _ in self._seen]).tolist() if self._seen else []
        if all(finite):
            self._seen.clear()
            return None
        number, named = finite.index(False), self._seen[finite.index(False)][1]
        try:
            refuse_non_finite(f"{where}, micro-batch {number + 1} of {len(finite)}", **named)
        except NonFiniteError as error:
            return error
        raise AssertionError("a tensor changed after its backward")

    def clear(self) -> None:
        self._seen.clear()
