"""NaN and infinity are refused by name."""

from __future__ import annotations

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
