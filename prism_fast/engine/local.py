"""The local engine: one process, one model, one optimizer, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from prism_fast.engine.adamw import MOMENTS, decayed, learning_rate, make_adamw, norm_error
from prism_fast.engine.finite import Seen
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Update
from prism_fast.engine.root import Root
from prism_fast.engine.stored import FILE, Stored, write
from prism_fast.models.lora import plain_weights

T = TypeVar("T")


class LocalEngine:
    """The engine of :mod:`prism_fast.engine.protocol` in one process, with AdamW.

    A parameter of half precision learns through its *master*: a float32 copy that AdamW updates, from gradients added
    up in float32. After an update the parameter is its master, rounded once. A parameter that is wider is its own
    master, and nothing is copied.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, schedule: Callable[[int], float] | None = None):
        """``schedule``: factor of the learning rate by update (from 0)."""
        self.module = module
        self.root = Root(module)
        self.config = config
        self.schedule = schedule
        self.updates = 0
        self.ranks, self.lockstep = 1, False
        self.packing_checked = False
        self.where = "an update"  # for errors; a stage puts its name and step here
        self._seen = Seen()
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        #: the tensors that AdamW updates, by the parameter's name; ``.grad`` is the step's gradient
        self.masters = {name: p if p.dtype.itemsize >= 4 else _master(p) for name, p in trainable.items()}
        self._rounded = {name: p for name, p in trainable.items() if self.masters[name] is not p}
        self.optimizer = make_adamw(self.masters, decayed(trainable), config)

    def run(self, fn: Callable[[], T]) -> T:
        return self.root(fn)

    def lr(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.config, self.schedule, self.updates)

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        self._seen.add(loss, made_of)
        with self._gradients_to_masters():
            loss.backward()

    @contextmanager
    def _gradients_to_masters(self) -> Iterator[None]:
        """Add every half-precision gradient to its master's as soon as it is complete, and drop it: a second set of
        gradients never exists. Only within the block, because other code may want gradients of these parameters."""

        def move(parameter: Tensor, master: Tensor) -> None:
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p, master=self.masters[name]: move(p, master))
            for name, parameter in self._rounded.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def verify(self) -> None:
        if (fault := self._seen.fault(self.where)) is not None:
            self.discard()
            raise fault

    def discard(self) -> None:
        self._seen.clear()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._rounded.values():  # left by a backward that failed halfway
            parameter.grad = None

    def step(self) -> Update:
        self.verify()
        masters = self.masters.values()
        total = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        norm = float(total)
        if not math.isfinite(norm):  # checked before clipping, which would make every gradient NaN
            bad = [n for n, p in self.masters.items() if p.grad is not None and not p.grad.isfinite().all()]
            self.discard()
            raise norm_error(self.where, norm, bad)
        torch.nn.utils.clip_grads_with_norm_(masters, self.config.clip_norm, total)
        update = Update(norm, self.lr())
        for group in self.optimizer.param_groups:
            group["lr"] = update.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        self.updates += 1
        return update

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self._rounded.items():
            parameter.copy_(self.masters[name])

    def agree(self, flag: bool) -> bool:
        return flag

    def max(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from plain_weights(self.module, ((name, p.detach()) for name, p in self.module.named_parameters()))

    def save(self, folder: Path) -> None:
        tensors = {"updates": torch.tensor(self.updates)}
        for name, p in self.module.named_parameters():
            master = self.masters.get(name, p)
            tensors[f"model.{name}"] = master
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(master, {}).items()}
        write(folder / FILE, tensors)

    def load(self, folder: Path) -> None:
        stored, weights = Stored(folder), dict(self.module.named_parameters())
        stored.belong_to({name: tuple(p.shape) for name, p in weights.items()})
        self.discard()
        self.optimizer.state.clear()
        self.updates = stored.updates
        for name, p in weights.items():
            master = self.masters.get(name, p)
            master.detach().copy_(stored[f"model.{name}"])
            if f"step.{name}" in stored:  # AdamW has no state for a parameter that never had a gradient
                moments = {key: stored[f"{key}.{name}"].to(master.device) for key in MOMENTS}
                self.optimizer.state[master] = moments
        self._round()

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def reload(self) -> None:
        self._move(next(self.module.parameters()).device)

    def close(self) -> None:
        """Nothing: all of it ends with the last reference."""

    def _move(self, device: torch.device) -> None:
        """Move moments, gradients and separate masters; a parameter that is its own master stays, as it is in use."""
        tensors = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        for name, master in self.masters.items():
            tensors += [master] if name in self._rounded else []
            tensors += [master.grad] if master.grad is not None else []
        for tensor in tensors:
            tensor.data = tensor.data.to(device)  # in place: the optimizer knows its tensors by identity


def _master(parameter: Tensor) -> Tensor:
    return parameter.detach().float().requires_grad_(True)
