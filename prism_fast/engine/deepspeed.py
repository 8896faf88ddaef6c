"""The DeepSpeed engine: weights, gradients and moments of one model sharded over ranks (ZeRO stages 1, 2 and 3).

DeepSpeed shards and gathers; the arithmetic is this project's own and that of the local engine. It reduces *averages*,
so gradients are multiplied by the number of ranks (exact for powers of two) together with the clip factor, after the
reduction and in float32. AdamW runs on views of DeepSpeed's flat float32 partitions, one per parameter, so that each
parameter has its own step count and one without a gradient is left alone.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prism_fast.engine.adamw import MOMENTS, clip_factor, decayed, learning_rate, make_adamw, norm_error
from prism_fast.engine.deepspeed_config import deepspeed_config, import_deepspeed
from prism_fast.engine.finite import NonFiniteError, Seen
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Update
from prism_fast.engine.release import forget_gradients, release
from prism_fast.engine.root import Root
from prism_fast.engine.stored import Stored, part_name, write
from prism_fast.engine.world import World
from prism_fast.models.lora import plain_weights
from prism_fast.models.writing import DiskFullError

T = TypeVar("T")


WHOLE = -1


class Piece(NamedTuple):
    """This rank's part of a parameter's master: ``tensor`` [n] is elements ``start`` to ``start + n`` of the flat
    parameter, a view of partition ``flat`` at ``offset`` (``WHOLE``: of the parameter itself, in no partition)."""

    flat: int
    offset: int
    start: int
    tensor: nn.Parameter


class DeepSpeedEngine:
    """The engine of :mod:`prism_fast.engine.protocol` over the ranks of ``torch.distributed``, with AdamW.

    Stages 1 and 2 hold whole weights and, during a step, whole gradients, which are reduced once, at its end
    (DeepSpeed's coalesced reduction). The number of micro-batches may differ between ranks; both stages need the same
    memory. Stage 3 holds no whole weight outside of `run` and reduces in every `backward`: ranks go in ``lockstep``.

    A model in half precision learns through float32 masters, from gradients added up and reduced in float32. DeepSpeed
    would round its float32 weights (a discriminator's head), so it never sees them: from here on they are plain tensors
    of their modules, whole on every rank, and all ranks make the same update of them.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        stage: int,
        schedule: Callable[[int], float] | None = None,
        options: Mapping[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        """All ranks make their engines in the same order; weights are those of rank 0.

        ``module``: on its device, in float32, or in bfloat16 with or without weights in float32. ``options``: of
        DeepSpeed's own configuration, except those that the engine sets. ``world``: None: one is made.

        Raises:
            ImportError: DeepSpeed is missing or its version is not supported.
            ValueError: another stage or dtype, an option that the engine sets.
            RuntimeError: there is no process group.
        """
        dtype = _dtype_of(module)
        settings = deepspeed_config(stage, dtype, options or {})
        deepspeed = import_deepspeed()
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: start the run with torchrun (torch.distributed.init_process_group)"
            )
        self.world = World() if world is None else world
        self.module, self.config, self.schedule, self.stage = module, config, schedule, stage
        self.ranks, self.lockstep = self.world.size, stage == 3
        self.updates, self.where, self.packing_checked = 0, "an update", True
        self._seen = Seen()
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._parameters = dict(module.named_parameters())
        self._device = next(module.parameters()).device
        decay = decayed({name: self._parameters[name] for name in self._names})
        self._replicated = _take_out(module, dtype)
        self._parameters |= self._replicated
        for tensor in self._replicated.values():
            dist.broadcast(tensor.detach(), 0)
        sharded = [name for name in self._names if name not in self._replicated]
        if dtype.itemsize < 4 and stage < 3:
            for name in sharded:
                self._parameters[name].grad_dtype = torch.float32  # micro-batches add up in it
        _prepare(deepspeed, self._device)
        trainable = [self._parameters[name] for name in sharded]
        self._ds, *_ = deepspeed.initialize(
            model=Root(module), optimizer=_Relay(trainable, self._update), config=settings, dist_init_required=False
        )
        self.root = self._ds.module
        self._zero = self._ds.optimizer
        pieces = dict(self._own_pieces(sharded))
        for name, tensor in self._replicated.items():
            if name in self._names:
                pieces[name] = Piece(WHOLE, 0, 0, nn.Parameter(tensor.detach().view(-1)))
        self._pieces = {name: pieces[name] for name in self._names if name in pieces}
        self._adamw = make_adamw({name: piece.tensor for name, piece in self._pieces.items()}, decay, config)
        self._open: AbstractContextManager | None = None  # of the coalesced reduction, from a step's first backward on
        self._factor = 1.0
        self._updated: set[str] = set()
        # Closing the coalesced reduction reduces what gradients there are. An engine that is dropped, or a process that
        # ends, within a step must not wait there for other ranks.
        weakref.finalize(self, forget_gradients, list(self._parameters.values()))

    # Passes.

    def run(self, fn: Callable[[], T]) -> T:
        return self._ds(fn)

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        self._seen.add(loss, made_of)
        if self.stage == 3:
            # Always add to the partitions, which are cleared by hand: DeepSpeed counts forwards to know the first
            # backward of a step, overwrites then, and leaves the last step's gradient where there was none.
            self._zero.micro_step_id = 1
        elif self._open is None:
            self._open = self._ds.coalesce_grad_reduction()
            self._open.__enter__()
        self._ds.backward(loss, scale_wrt_gas=False)

    def verify(self) -> None:
        fault = self._seen.fault(self.where)
        found = self.world.fault(None if fault is None else str(fault))
        if found is not None:
            self.discard()
            raise NonFiniteError(self.world.named(*found))

    def discard(self) -> None:
        self._seen.clear()
        forget_gradients(self._parameters.values())
        if self.stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        elif self._open is not None:
            self._reduce()  # nothing: there is no gradient
        self._drop_reduced()

    def _drop_reduced(self) -> None:
        gradients = self._zero.averaged_gradients
        for group in list(gradients):
            gradients[group] = None

    def _reduce(self) -> None:
        """Close the coalesced reduction: one pass over all gradients."""
        context, self._open = self._open, None
        context.__exit__(None, None, None)

    # The update.

    def step(self) -> Update:
        self.verify()
        if self.stage < 3:
            updated = self._fill()
            if self._open is None:  # no rank of this kind had a micro-batch, others may have
                self._open = self._ds.coalesce_grad_reduction()
                self._open.__enter__()
            self._reduce()
        else:
            updated = self._nonzero()
        self._sum_replicated(updated)
        self._updated = updated
        norm = self._norm()
        if not math.isfinite(norm):
            bad = self._not_finite()
            self.discard()
            raise norm_error(self.where, norm, bad)
        update = Update(norm, learning_rate(self.config, self.schedule, self.updates))
        for group in self._adamw.param_groups:
            group["lr"] = update.lr
        clip = clip_factor(norm, self.config.clip_norm)
        self._factor = self.ranks * clip
        for name in self._replicated_with_gradient():
            tensor = self._replicated[name]
            self._pieces[name].tensor.grad, tensor.grad = tensor.grad.view(-1) * clip, None
        self._ds.step()
        if self.stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        self.updates += 1
        return update

    def _update(self, partitions: Iterable[Tensor]) -> None:
        """AdamW on this rank's pieces of ``partitions``, whose ``.grad`` is the average over ranks."""
        wanted = {id(partition): partition.grad for partition in partitions}
        flats = self._flats()
        for name, piece in self._pieces.items():
            gradient = wanted.get(id(flats[piece.flat])) if piece.flat != WHOLE else None
            if gradient is not None and name in self._updated:
                piece.tensor.grad = gradient.narrow(0, piece.offset, piece.tensor.numel()).mul_(self._factor)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def _fill(self) -> set[str]:
        """Give parameters that another rank has a gradient for a zero one; the names of all that any rank has."""
        has = [self._parameters[name].grad is not None for name in self._names]
        updated = self._anywhere(has, self._names)
        for name, here in zip(self._names, has, strict=True):
            if name in updated and not here:
                p = self._parameters[name]
                p.grad = torch.zeros_like(p, dtype=torch.float32)
        return updated

    def _nonzero(self) -> set[str]:
        """Stage 3: the parameters whose gradient is not exactly 0. A blank image gives the vision tower a zero one,
        and one that nothing touched keeps its cleared partition."""
        names = {id(p): name for name, p in self._parameters.items()}
        found = {
            names[id(p)]: gradient.any()
            for group, parameters in enumerate(self._zero.fp16_groups)
            for p, gradient in zip(parameters, self._zero.averaged_gradients[group], strict=True)
        }
        found |= {name: torch.tensor(True, device=self._device) for name in self._replicated_with_gradient()}
        return self._anywhere(torch.stack(list(found.values())).tolist(), list(found))

    def _replicated_with_gradient(self) -> list[str]:
        return [name for name, tensor in self._replicated.items() if tensor.grad is not None]

    def _sum_replicated(self, updated: set[str]) -> None:
        """Joint. Sum the gradients of replicated weights over the ranks."""
        for name, tensor in self._replicated.items():
            if name in updated:
                tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                dist.all_reduce(tensor.grad)

    def _anywhere(self, flags: Sequence[bool], names: Sequence[str]) -> set[str]:
        """The parameters that have their flag on any rank."""
        here = dict(zip(names, flags, strict=True))
        anywhere = self.world.max([here.get(name, False) for name in self._names])
        return {name for name, flag in zip(self._names, anywhere, strict=True) if flag}

    def _reduced(self) -> dict[str, Tensor]:
        """This rank's pieces of the averaged gradient, after the reduction."""
        flat = {
            group: torch.cat([part.reshape(-1) for part in parts])
            for group, parts in self._zero.averaged_gradients.items()
            if parts is not None
        }
        found = {
            name: flat[piece.flat].narrow(0, piece.offset, piece.tensor.numel())
            for name, piece in self._pieces.items()
            if piece.flat in flat
        }
        return found | {name: self._replicated[name].grad for name in self._replicated_with_gradient()}

    def _norm(self) -> float:
        """Norm of the summed gradient over all ranks."""
        parts = [g for group in self._zero.averaged_gradients.values() if group is not None for g in group]
        squares = self.ranks**2 * sum((g.float().norm().double().square() for g in parts), start=torch.zeros(()))
        if self.world.rank == 0:  # once, as all ranks have them
            whole = [self._replicated[name].grad for name in self._replicated_with_gradient()]
            squares = squares + sum((g.norm().double().square() for g in whole), start=torch.zeros(()))
        return math.sqrt(self.world.sum([float(squares)])[0])

    def _not_finite(self) -> list[str]:
        gradients = self._reduced()
        bad = self._anywhere([not bool(g.isfinite().all()) for g in gradients.values()], list(gradients))
        return [name for name in self._names if name in bad]

    # Between ranks.

    def agree(self, flag: bool) -> bool:
        return self.world.agree(flag)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self.world.sum(values)

    def max(self, values: Sequence[float]) -> list[float]:
        return self.world.max(values)

    # Weights.

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from plain_weights(self.module, self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for _, names in groupby(self._shapes, key=_layer):
            layer = [(name, self._parameters[name]) for name in names]
            with self._gathered([p for _, p in layer]):
                for name, p in layer:
                    yield name, p.detach()

    def _gathered(self, parameters: Sequence[nn.Parameter], **options: int) -> AbstractContextManager:
        if self.stage < 3:
            return nullcontext()
        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        return import_deepspeed().zero.GatheredParameters(sharded, **options) if sharded else nullcontext()

    def save(self, folder: Path) -> None:
        tensors: dict[str, Tensor] = {"updates": torch.tensor(self.updates)} if self.world.rank == 0 else {}
        steps = self.world.max([self._steps(name) for name in self._names])
        step_of = dict(zip(self._names, steps, strict=True))
        written, share = 0, sum(math.prod(shape) for shape in self._shapes.values()) / self.ranks
        for name, shape in self._shapes.items():
            owner = min(self.ranks - 1, int(written / share))
            whole = {f"model.{name}": self._whole_weight(name)}
            if step_of.get(name, -1.0) >= 0:
                whole[f"step.{name}"] = torch.tensor(step_of[name], dtype=torch.float32)
                for key in MOMENTS[1:]:
                    whole[f"{key}.{name}"] = self._whole(name, self._state(name).get(key))
            if owner == self.world.rank:
                tensors |= {key: tensor.cpu() for key, tensor in whole.items()}
            written += math.prod(shape)
        fault: Exception | None = None
        try:
            write(folder / part_name(self.world.rank, self.ranks), tensors)
        except Exception as error:  # told to the other ranks, which would wait otherwise
            fault = error
        found = self.world.fault(None if fault is None else str(fault))
        if fault is not None:
            raise fault
        if found is not None:
            raise DiskFullError(self.world.named(*found))

    def load(self, folder: Path) -> None:
        stored = Stored(folder)
        stored.belong_to(self._shapes)
        self.discard()
        self._adamw.state.clear()
        self.updates = stored.updates
        for name, p in self._parameters.items():
            weight = stored[f"model.{name}"]
            if name in self._pieces:
                self._pieces[name].tensor.detach().copy_(self._cut(name, weight))
            if not p.requires_grad:
                with self._gathered([p], modifier_rank=0), torch.no_grad():
                    p.copy_(weight)
            if f"step.{name}" in stored and name in self._pieces:
                piece = self._pieces[name].tensor
                moments = {key: self._cut(name, stored[f"{key}.{name}"]).to(piece.device) for key in MOMENTS[1:]}
                self._adamw.state[piece] = {"step": stored[f"step.{name}"].to(piece.device), **moments}
        self._round()

    def _round(self) -> None:
        """The weights that are computed with, from the masters."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)

    def _steps(self, name: str) -> float:
        """AdamW's updates of a parameter; -1 where this rank has no state of it."""
        state = self._state(name)
        return float(state["step"]) if state else -1.0

    def _state(self, name: str) -> dict[str, Tensor]:
        return self._adamw.state.get(self._pieces[name].tensor, {}) if name in self._pieces else {}

    def _whole_weight(self, name: str) -> Tensor:
        """Joint. A parameter's master, or the parameter itself where it is frozen."""
        p = self._parameters[name]
        if p.requires_grad:
            return self._whole(name, self._pieces[name].tensor if name in self._pieces else None)
        with self._gathered([p]):
            return p.detach().clone()

    def _whole(self, name: str, piece: Tensor | None) -> Tensor:
        """Joint. A float32 tensor of the parameter's shape from every rank's piece of it (None: it has none)."""
        if name in self._replicated:
            return piece.detach().clone().view(self._shapes[name])
        whole = torch.zeros(math.prod(self._shapes[name]), dtype=torch.float32, device=self._device)
        if piece is not None:
            whole.narrow(0, self._pieces[name].start, piece.numel()).copy_(piece.detach())
        dist.all_reduce(whole)
        return whole.view(self._shapes[name])

    def _cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor."""
        piece = self._pieces[name]
        return whole.reshape(-1).narrow(0, piece.start, piece.tensor.numel()).clone()

    # Memory.

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def reload(self) -> None:
        self._move(self._device)

    def close(self) -> None:
        self._adamw.state.clear()
        release(self._ds, self.module)

    def _move(self, device: torch.device) -> None:
        """Move the partitions of masters and the moments. Gradients stay where DeepSpeed has them."""
        for state in self._adamw.state.values():
            for tensor in state.values():
                tensor.data = tensor.data.to(device)
        for flat in self._flats():
            flat.data = flat.data.to(device)
        for piece in (p for p in self._pieces.values() if p.flat != WHOLE):  # views, which show the old memory
            piece.tensor.data = self._flats()[piece.flat].data.narrow(0, piece.offset, piece.tensor.numel())

    # Where DeepSpeed keeps a parameter.

    def _flats(self) -> list[Tensor]:
        """This rank's float32 partitions."""
        return self._zero.single_partition_of_fp32_groups if self.stage < 3 else self._zero.fp32_partitioned_groups_flat

    def _own_pieces(self, sharded: Sequence[str]) -> Iterator[tuple[str, Piece]]:
        flats = self._flats()
        for name in sharded:
            p = self._parameters[name]
            if self.stage < 3:
                place = p._hp_mapping
                if place is None:
                    continue
                flat, offset = place.param_group_index, place.hp_fragment_address.start
                count, start = place.hp_fragment_address.numel, place.lp_fragment_address.start
            else:
                flat, offset, size = self._zero.grad_position[self._zero.get_param_id(p)]
                start = self.world.rank * size
                count = min(size, math.prod(self._shapes[name]) - start)  # the last partition is padded
                if count <= 0:
                    continue
            view = flats[flat].detach().narrow(0, offset, count)
            yield name, Piece(flat, offset, start, nn.Parameter(view))


class _Relay(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer. It puts its flat partitions in place of the parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter], update: Callable[[Iterable[Tensor]], None]) -> None:
        super().__init__([{"params": list(parameters)}], {"lr": 0.0})
        self._update = weakref.WeakMethod(update)  # DeepSpeed must not keep the engine alive

    def step(self, closure: None = None) -> None:
        update = self._update()
        if update is not None:
            update([p for group in self.param_groups for p in group["params"]])


def _layer(name: str) -> str:
    """The layer of a parameter: the name up to the first number, else that of its module."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name.rpartition(".")[0]


def _dtype_of(module: nn.Module) -> torch.dtype:
    dtypes = {p.dtype: name for name, p in module.named_parameters()}
    if other := dtypes.keys() - {torch.float32, torch.bfloat16}:
        shown = ", ".join(f"{dtype} ({dtypes[dtype]})" for dtype in other)
        raise ValueError(f"engine.kind=deepspeed takes float32 or bfloat16, got {shown}: set model.dtype")
    return torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32


def _take_out(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of another dtype than ``dtype``, which become plain tensors of their modules."""
    taken = {}
    for prefix, child in module.named_modules():
        for name, p in list(child.named_parameters(recurse=False)):
            if p.dtype != dtype:
                del child._parameters[name]
                tensor = p.detach().requires_grad_(p.requires_grad)
                setattr(child, name, tensor)
                taken[f"{prefix}.{name}" if prefix else name] = tensor
    return taken


def _prepare(deepspeed: Any, device: torch.device) -> None:
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asks for it, torchrun sets it
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at the first start; gloo does as well.
        deepspeed.ops.__compatible_ops__["shm_comm"] = False
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
