"""The local engine: one process, one model, one optimizer, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prism_fast.engine.finite import NonFiniteError, refuse_non_finite
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Update
from prism_fast.engine.root import Root
from prism_fast.models.writing import disk_full, look_for_room

T = TypeVar("T")
FILE = "engine.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


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
        self.packing_checked = False
        self.where = "an update"  # for errors; a stage puts its name and step here
        self._seen: list[tuple[Tensor, dict[str, Tensor]]] = []  # per backward: whether all are finite (0-d), and them
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        #: the tensors that AdamW updates, by the parameter's name; ``.grad`` is the step's gradient
        self.masters = {name: p if p.dtype.itemsize >= 4 else _master(p) for name, p in trainable.items()}
        self._rounded = {name: p for name, p in trainable.items() if self.masters[name] is not p}
        exempt = [name for name, p in trainable.items() if p.ndim < 2 or name.endswith("bias")]  # norms and biases
        decayed = [name for name in trainable if name not in set(exempt)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.masters[name] for name in decayed], "weight_decay": config.weight_decay},
                {"params": [self.masters[name] for name in exempt], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=tuple(config.betas),
            fused=True,
        )

    def run(self, fn: Callable[[], T]) -> T:
        return self.root(fn)

    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up ((t + 1) / warmup, never 0), then the schedule."""
        scale = min(1.0, (self.updates + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.config.lr * scale * (self.schedule(self.updates) if self.schedule else 1.0)

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        named = {"loss": loss.detach(), **{name: tensor.detach() for name, tensor in made_of.items()}}
        self._seen.append((torch.stack([tensor.isfinite().all() for tensor in named.values()]).all(), named))
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
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            self.discard()
            raise NonFiniteError(
                f"{self.where}: the gradient norm is {norm}; not finite in: {', '.join(bad[:5])}{more}"
            )
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

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        tensors = {"updates": torch.tensor(self.updates)}
        for name, p in self.module.named_parameters():
            master = self.masters.get(name, p)
            tensors[f"model.{name}"] = master
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(master, {}).items()}
        file, needs = folder / FILE, sum(tensor.nbytes for tensor in tensors.values())
        with disk_full(file, needs):
            look_for_room(folder, needs)
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / FILE)
        weights = dict(self.module.named_parameters())
        for name, p in weights.items():
            saved = tensors.get(f"model.{name}")
            if saved is None or saved.shape != p.shape:
                fault = "is missing" if saved is None else f"has shape {tuple(saved.shape)}, not {tuple(p.shape)}"
                raise ValueError(f"the checkpoint does not belong to this model: {name} {fault}")
        if further := sorted(name for name in tensors if name.startswith("model.") and name[6:] not in weights):
            raise ValueError(f"the checkpoint does not belong to this model, which has no {further[0][6:]}")
        self.discard()
        self.optimizer.state.clear()
        self.updates = int(tensors["updates"])
        for name, p in weights.items():
            master = self.masters.get(name, p)
            master.detach().copy_(tensors[f"model.{name}"])
            if f"step.{name}" in tensors:  # AdamW has no state for a parameter that never had a gradient
                moments = {key: tensors[f"{key}.{name}"].to(master.device) for key in MOMENTS}
                self.optimizer.state[master] = moments
        self._round()

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def reload(self) -> None:
        self._move(next(self.module.parameters()).device)

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
