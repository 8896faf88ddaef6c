"""The engines under their contract, and broken ones that it catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_fast.engine.finite import Seen
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.engine.stored import FILE
from tests.contracts import engine as contract
from tests.contracts.engine import CHECKS, EXACT, Factory

T = TypeVar("T")


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("check", CHECKS + EXACT, ids=_name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_local_engine(check, dtype, tmp_path):
    check(Factory(LocalEngine, dtype), tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_the_local_engine_with_masters(check, tmp_path):
    check(Factory(LocalEngine, torch.bfloat16), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_the_local_engine_on_a_card(check, dtype, tmp_path):
    check(Factory(LocalEngine, dtype, torch.device("cuda")), tmp_path)


class ScalesTheLoss(LocalEngine):
    """By a number of ranks, say: a gradient that comes back through it is scaled twice."""

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        super().backward(2 * loss, **made_of)


class ForgetsToClear(LocalEngine):
    def step(self) -> Update:
        kept = {name: master.grad.clone() for name, master in self.masters.items() if master.grad is not None}
        update = super().step()
        for name, gradient in kept.items():
            self.masters[name].grad = gradient
        return update


class DropsTheLastMicroBatch(LocalEngine):
    waiting: Tensor | None = None

    def backward(self, loss: Tensor, **made_of: Tensor) -> None:
        if self.waiting is not None:
            super().backward(self.waiting)
        self.waiting = loss

    def step(self) -> Update:
        self.waiting = None
        return super().step()


class LoadsMomentsWrongly(LocalEngine):
    """The second moments are lost."""

    def load(self, folder: Path) -> None:
        super().load(folder)
        for state in self.optimizer.state.values():
            state["exp_avg_sq"] = torch.full_like(state["exp_avg_sq"], 1e-3)


class ForgetsItsUpdates(LocalEngine):
    """The schedule begins anew."""

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.updates = 0


class SavesWhatIsComputedWith(LocalEngine):
    """Weights of half precision instead of their masters."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        tensors = load_file(folder / FILE)
        tensors |= {f"model.{name}": tensor.contiguous() for name, tensor in self.named_weights()}
        save_file(tensors, folder / FILE)


class LooksAtNothing(LocalEngine):
    def verify(self) -> None:
        self._seen.clear()


class RemembersWhatWasDropped(LocalEngine):
    def discard(self) -> None:
        kept, self._seen = self._seen, Seen()
        super().discard()
        self._seen = kept


class CallsNoModule(LocalEngine):
    def run(self, fn: Callable[[], T]) -> T:
        return fn()


class GivesMasters(LocalEngine):
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, self.masters.get(name, parameter).detach()


class DecaysEverything(LocalEngine):
    def __init__(self, module, config, **options):
        super().__init__(module, config, **options)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = config.weight_decay


BROKEN = [
    (ScalesTheLoss, torch.float64, contract.gradients_are_those_of_autograd),
    (ScalesTheLoss, torch.float64, contract.a_gradient_may_come_back_through_the_engine),
    (ForgetsToClear, torch.float64, contract.updates_are_those_of_adamw),
    (ForgetsToClear, torch.bfloat16, contract.gradients_are_cleared_by_a_step),
    (DropsTheLastMicroBatch, torch.float64, contract.gradients_are_those_of_autograd),
    (DropsTheLastMicroBatch, torch.float64, contract.the_cut_into_micro_batches_changes_nothing),
    (LoadsMomentsWrongly, torch.float64, contract.what_is_saved_goes_on_to_the_bit),
    (ForgetsItsUpdates, torch.float32, contract.what_is_saved_goes_on_to_the_bit),
    (SavesWhatIsComputedWith, torch.bfloat16, contract.what_is_saved_goes_on_to_the_bit),
    (LooksAtNothing, torch.float32, contract.what_is_not_finite_is_refused_by_name),
    (RemembersWhatWasDropped, torch.float32, contract.verify_keeps_and_discard_drops_what_was_accumulated),
    (CallsNoModule, torch.float32, contract.run_calls_the_root),
    (GivesMasters, torch.bfloat16, contract.named_weights_are_whole_and_all),
    (DecaysEverything, torch.float64, contract.updates_are_those_of_adamw),
]


@pytest.mark.parametrize(("broken", "dtype", "check"), BROKEN, ids=_name)
def test_a_broken_engine_is_caught(broken, dtype, check, tmp_path):
    with pytest.raises(AssertionError):
        check(Factory(broken, dtype), tmp_path)
