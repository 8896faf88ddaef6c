"""The local engine: one process, one model, one optimizer, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prism_fast.config import OptimizerConfig


class NonFiniteError(RuntimeError):
    """A score, a loss or a gradient is NaN or infinite; this engine's weights are those before the step."""


def refuse_non_finite(where: str, **tensors: Tensor) -> None:
    """Raise :class:`NonFiniteError` naming every tensor that holds a NaN or an infinity, with the first such place."""
    found = []
    for name, tensor in tensors.items():
        bad = ~tensor.detach().isfinite()
        if count := int(bad.sum()):
            first = bad.nonzero()[0].tolist()
            value = float(tensor.detach()[tuple(first)])
            found.append(
                f"{name} ({count} of {tensor.numel()}" + (f", first {value} at {first})" if first else f": {value})")
            )
    if found:
        raise NonFiniteError(f"{where}: not finite: {', '.join(found)}")


class LocalEngine:
    """Accumulates gradients over micro-batches and steps AdamW.

    The micro-batch count may differ from step to step: losses arrive divided by their global denominator, so gradients
    simply add up.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, schedule: Callable[[int], float] | None = None):
        self.model = model
        self.config = config
        self.schedule = schedule
        self.updates = 0
        self.packing_checked = False  # set by train.self_check
        self.where = "an update"  # for errors; a stage puts its name and step here
        self._seen: list[tuple[Tensor, dict[str, Tensor]]] = []  # per micro-batch: all finite (0-d bool), of what
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        exempt = [p for name, p in trainable if p.ndim < 2 or name.endswith("bias")]  # norms and biases
        decayed = [p for name, p in trainable if not (p.ndim < 2 or name.endswith("bias"))]
        self.parameters = [p for _, p in trainable]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}],
            lr=config.lr,
            betas=tuple(config.betas),
            fused=True,
        )

    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up ((t + 1) / warmup, never 0), then the schedule."""
        scale = min(1.0, (self.updates + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.config.lr * scale * (self.schedule(self.updates) if self.schedule else 1.0)

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer moments by name, for a checkpoint."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state_tensors` gave.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                saved = tensors.get(f"model.{name}")
                if saved is None or saved.shape != p.shape:
                    found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}, not {tuple(p.shape)}"
                    raise ValueError(f"the checkpoint does not belong to this model: {name} {found}")
                p.copy_(saved)
                moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                if moments["step"] is not None:
                    self.optimizer.state[p] = {
                        key: value.to(device=p.device) if key != "step" else value for key, value in moments.items()
                    }

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        """Add the gradient of a micro-batch's loss. `verify` looks at the loss and what it was ``made_of`` (scores,
        log-probs): looking now would make the host wait for the device between two micro-batches."""
        named = {"loss": loss.detach(), **{name: tensor.detach() for name, tensor in made_of.items()}}
        self._seen.append((torch.stack([tensor.isfinite().all() for tensor in named.values()]).all(), named))
        loss.backward()

    def verify(self) -> None:
        """Look at the micro-batches since the last update, once for all of them.

        Raises:
            NonFiniteError: a loss or something that it was made of is NaN or infinite; the gradients are dropped.
        """
        if not self._seen:
            return
        finite = torch.stack([flag for flag, _ in self._seen]).tolist()
        if all(finite):
            self._seen.clear()
            return
        number, named = finite.index(False), self._seen[finite.index(False)][1]
        self.discard()
        refuse_non_finite(f"{self.where}, micro-batch {number + 1} of {len(finite)}", **named)

    def discard(self) -> None:
        """Drop the accumulated gradients without an update."""
        self._seen.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping.

        Raises:
            NonFiniteError: as `verify`, or the norm is NaN or infinite; nothing was updated.
        """
        self.verify()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        if not math.isfinite(norm):
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise NonFiniteError(
                f"{self.where}: the gradient norm is {norm}; not finite in: {', '.join(bad[:5])}{more}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm
