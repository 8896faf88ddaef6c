"""What every engine must do, whatever is behind it: checks that see an engine through its protocol alone.

A check takes a factory and a folder of its own, and fails with AssertionError. ``EXACT`` are for engines of a wide
dtype, ``CHECKS`` for every dtype. A new engine runs them all; tests/contracts/test_engine.py shows how, and which
broken engines they catch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import torch
from torch import Tensor, nn

from prism_fast.engine.finite import NonFiniteError
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Engine, Update

WIDTH, TOKENS = 6, 11


class Make(Protocol):
    def __call__(
        self, module: nn.Module, config: OptimizerConfig, *, schedule: Callable[[int], float] | None = None
    ) -> Engine: ...


class Factory(NamedTuple):
    """``make``: the engine's constructor; ``dtype``, ``device``: of the models that it is given."""

    make: Make
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")


class Small(nn.Module):
    """A tied table, layers, a norm; a weight that is frozen and one that nothing reads. Never called itself."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.unread = nn.Parameter(torch.randn(WIDTH, WIDTH))


def hidden(module: Small, ids: Tensor) -> Tensor:
    """States [B, S, WIDTH] of ids [B, S]."""
    states = module.table(ids.to(module.frozen.device)) + module.frozen
    for layer in module.layers:
        states = states + layer(states).tanh()
    return module.norm(states)


def nats(module: Small, states: Tensor, ids: Tensor) -> Tensor:
    """Negative log-probs [B, S] of ids [B, S]."""
    return -module.head(states).log_softmax(-1).gather(-1, ids.to(states.device)[..., None])[..., 0]


def loss_of(module: Small, ids: Tensor, denominator: float) -> Tensor:
    return nats(module, hidden(module, ids), ids.roll(1, 1)).sum() / denominator


def new(factory: Factory, config: OptimizerConfig | None = None, *, seed: int = 0, **options) -> Engine:
    return factory.make(Small(seed).to(factory.device, factory.dtype), config or OptimizerConfig(lr=0.03), **options)


def batch(step: int) -> Tensor:
    """ids [12, 5] of a step."""
    return torch.randint(0, TOKENS, (12, 5), generator=torch.Generator().manual_seed(step))


def accumulate(engine: Engine, ids: Tensor, parts: int = 3, *, scale: float = 1.0) -> None:
    """Gradients of a batch in ``parts`` micro-batches, divided by the denominator of the whole batch."""
    for part in ids.tensor_split(parts):
        loss = engine.run(lambda part=part: loss_of(engine.module, part, ids.numel() / scale))
        engine.backward(loss)


def train(engine: Engine, steps: Sequence[int], parts: int = 3) -> list[Update]:
    updates = []
    for step in steps:
        accumulate(engine, batch(step), parts)
        updates.append(engine.step())
    return updates


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs"


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], relative: float) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        distance, size = (tensor.double() - other[name].double()).norm(), other[name].double().norm()
        assert distance <= relative * size, f"{name} is off by {float(distance / size):.1e}, allowed {relative:.1e}"


def rounding(factory: Factory) -> float:
    """A bound on what sums in another order change."""
    return 1e3 * torch.finfo(factory.dtype).eps


def taken_gradient(engine: Engine, accumulate_tiny: Callable[[float], None]) -> dict[str, Tensor]:
    """The gradient of an update, read from what it did to the weights.

    Where a gradient is far below AdamW's epsilon (1e-8), the first update is lr · gradient / epsilon; so losses are
    scaled down, and the change is scaled up. Clipping and decay are off in ``TINY``."""
    before = weights(engine)
    accumulate_tiny(SCALE)
    engine.step()
    factor = 1e-8 / (SCALE * TINY.lr)
    return {name: (before[name] - after) * factor for name, after in weights(engine).items()}


SCALE = 1e-14
TINY = OptimizerConfig(lr=1e3, weight_decay=0.0, clip_norm=1e9)


def plain_gradient(ids: Tensor) -> dict[str, Tensor]:
    """By autograd alone, float64, in one piece; 0 where there is none."""
    module = Small(0).double()
    loss_of(module, ids, ids.numel()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


# Exact: of a wide dtype.


def gradients_are_those_of_autograd(factory: Factory, folder: Path) -> None:
    engine = new(factory, TINY)
    found = taken_gradient(engine, lambda scale: accumulate(engine, batch(1), scale=scale))
    assert_close(found, plain_gradient(batch(1)), max(1e-5, 30 * rounding(factory)))


def a_gradient_may_come_back_through_the_engine(factory: Factory, folder: Path) -> None:
    """A cut group's features: computed once, learned from in parts, their gradient sent back as a further loss."""
    engine = new(factory, TINY)

    def in_two_passes(scale: float) -> None:
        ids = batch(1)
        states = engine.run(lambda: hidden(engine.module, ids))
        leaf = states.detach().requires_grad_(True)
        for rows in torch.arange(len(ids)).tensor_split(3):
            part = ids.roll(1, 1)[rows]
            loss = engine.run(lambda r=rows, p=part: nats(engine.module, leaf[r], p).sum() / (ids.numel() / scale))
            engine.backward(loss)
        engine.backward((states * leaf.grad).sum())

    found = taken_gradient(engine, in_two_passes)
    assert_close(found, plain_gradient(batch(1)), max(1e-5, 30 * rounding(factory)))


def the_cut_into_micro_batches_changes_nothing(factory: Factory, folder: Path) -> None:
    found = []
    for parts in (1, 3, 12):
        engine = new(factory)
        found.append(([update.grad_norm for update in train(engine, range(4), parts)], weights(engine)))
    for norms, trained in found[1:]:
        assert norms == pytest.approx(found[0][0], rel=30 * rounding(factory))
        assert_close(trained, found[0][1], 30 * rounding(factory))


def updates_are_those_of_adamw(factory: Factory, folder: Path) -> None:
    """Clipping, warm-up, schedule and decay (of weights, not of norms and biases) against torch's, in float64."""
    config = OptimizerConfig(lr=0.02, weight_decay=0.3, betas=(0.8, 0.95), clip_norm=0.4, warmup_steps=3)
    rates = [0.02 / 3, 0.02 * 2 / 3 * 0.5, 0.02 * 0.25, 0.02 * 0.125, 0.02 * 0.0625]
    module = Small(0).double()
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas)
    norms = []
    for step, rate in enumerate(rates):
        loss_of(module, batch(step), batch(step).numel()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    engine = new(factory, config, schedule=lambda update: 0.5**update)
    updates = train(engine, range(5))
    assert max(norms) > config.clip_norm, "clipping must act for the check to say anything"
    assert [update.lr for update in updates] == pytest.approx(rates)
    assert [update.grad_norm for update in updates] == pytest.approx(norms, rel=30 * rounding(factory))
    wanted = {name: p.detach() for name, p in module.named_parameters()}
    assert_close(weights(engine), wanted, 100 * rounding(factory))


# Of every dtype.


def a_step_counts_and_tells(factory: Factory, folder: Path) -> None:
    config = OptimizerConfig(lr=0.1, warmup_steps=2)
    engine = new(factory, config, schedule=lambda update: 1.0 if update < 3 else 0.5)
    assert engine.updates == 0 and isinstance(engine.packing_checked, bool)
    updates = train(engine, range(4))
    assert engine.updates == 4 and all(isinstance(update, Update) for update in updates)
    assert [update.lr for update in updates] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert all(0 < update.grad_norm < float("inf") for update in updates)


def gradients_are_cleared_by_a_step(factory: Factory, folder: Path) -> None:
    """A gradient that is left over is added to the next one: the norm of the same batch would double."""
    engine = new(factory, OptimizerConfig(lr=1e-6))
    norms = [update.grad_norm for update in train(engine, (7, 7, 7))]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-2)


def verify_keeps_and_discard_drops_what_was_accumulated(factory: Factory, folder: Path) -> None:
    straight, engine = new(factory), new(factory)
    before = weights(engine)
    accumulate(engine, batch(1))
    engine.verify()
    engine.backward(engine.run(lambda: loss_of(engine.module, batch(1), 60)), logp=torch.tensor([torch.nan]))
    engine.discard()
    try:
        engine.verify()
    except NonFiniteError as error:
        raise AssertionError("verify looks at what was dropped") from error
    assert_same(weights(engine), before)
    assert engine.updates == 0
    accumulate(engine, batch(2))
    engine.verify()
    engine.verify()
    accumulate(straight, batch(2))
    assert engine.step() == straight.step()
    assert_same(weights(engine), weights(straight))


def what_is_not_finite_is_refused_by_name(factory: Factory, folder: Path) -> None:
    """A loss, what it was made of, a gradient: named with the place, nothing updated, and the next step is sound."""

    def poison(engine: Engine, kind: str) -> None:
        loss = engine.run(lambda: loss_of(engine.module, batch(1), 60))
        zero = engine.run(lambda: (0 * engine.module.norm.weight).sum())
        if kind == "loss":
            engine.backward(loss + torch.nan)
        elif kind == "logp":
            engine.backward(loss, logp=torch.tensor([0.0, -torch.inf, 1.0]), other=torch.zeros(2))
        else:
            engine.backward(loss + zero.sqrt())  # 0, whose gradient is not finite

    for kind, look in (("loss", "verify"), ("logp", "step"), ("logp", "verify"), ("norm.weight", "step")):
        straight, engine = new(factory), new(factory)
        engine.where = "align step 7"
        before = weights(engine)
        accumulate(engine, batch(1))
        poison(engine, kind)
        place = "" if kind == "norm.weight" else "micro-batch 4.*"  # of a gradient only the sum is looked at
        with refused(NonFiniteError, rf"align step 7.*{place}{re.escape(kind)}"):
            getattr(engine, look)()
        assert_same(weights(engine), before)
        assert engine.updates == 0
        assert train(engine, [3]) == train(straight, [3])
        assert_same(weights(engine), weights(straight))


def what_has_no_gradient_stays(factory: Factory, folder: Path) -> None:
    engine = new(factory, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = weights(engine)
    train(engine, range(3))
    after = weights(engine)
    stayed = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert stayed == {"frozen", "unread"}


def what_is_saved_goes_on_to_the_bit(factory: Factory, folder: Path) -> None:
    def made(seed: int) -> Engine:
        config = OptimizerConfig(lr=0.03, warmup_steps=5)
        return new(factory, config, seed=seed, schedule=lambda update: 1 / (1 + update))

    straight = made(0)
    train(straight, range(3))
    accumulate(straight, batch(9))
    straight.save(folder)
    straight.discard()
    files = list(folder.rglob("*"))
    assert files and {file.suffix for file in files if file.is_file()} == {".safetensors"}
    other = made(1)  # another model, with moments and half a step of its own
    train(other, range(4, 6))
    accumulate(other, batch(8))
    other.load(folder)
    assert other.updates == straight.updates == 3
    assert_same(weights(other), weights(straight))
    for step in range(3, 6):
        assert train(other, [step]) == train(straight, [step])
    assert_same(weights(other), weights(straight))


def another_models_checkpoint_is_refused(factory: Factory, folder: Path) -> None:
    new(factory).save(folder)
    module = Small(0).to(factory.dtype)
    module.layers[1] = nn.Linear(WIDTH, WIDTH + 1).to(factory.dtype)
    with refused(ValueError, r"layers\.1\.weight"):
        factory.make(module.to(factory.device), OptimizerConfig()).load(folder)

    def larger() -> Engine:
        module = Small(0)
        module.further = nn.Parameter(torch.zeros(WIDTH))
        return factory.make(module.to(factory.device, factory.dtype), OptimizerConfig())

    with refused(ValueError, "further"):
        larger().load(folder)
    larger().save(folder)
    with refused(ValueError, "further"):
        new(factory).load(folder)


def named_weights_are_whole_and_all(factory: Factory, folder: Path) -> None:
    engine = new(factory)
    wanted = dict(Small(0).named_parameters())  # a tied one once
    train(engine, [1])
    seen = {}
    for name, tensor in engine.named_weights():
        assert name not in seen, f"{name} comes twice"
        assert tensor.shape == wanted[name].shape and tensor.dtype == factory.dtype, name
        assert not tensor.requires_grad
        seen[name] = tensor.clone()
    assert set(seen) == set(wanted)
    layers = [layer for layer, _ in groupby(name.rpartition(".")[0] for name in seen)]
    assert len(layers) == len(set(layers)), f"a layer's weights do not follow each other: {layers}"
    ids = batch(3)
    copied = Small(5).to(factory.device, factory.dtype)
    copied.load_state_dict({**copied.state_dict(), **seen, "head.weight": seen["table.weight"]})
    with torch.no_grad():
        computed = engine.run(lambda: loss_of(engine.module, ids, 60))
        assert torch.equal(computed, loss_of(copied, ids, 60)), "they are not what is computed with"


def run_calls_the_root(factory: Factory, folder: Path) -> None:
    """Hooks of sharding see the begin and the end of everything that reads weights, also of what only reads one."""
    engine, told = new(factory), []
    engine.root.register_forward_pre_hook(lambda *_: told.append("begin"))
    engine.root.register_forward_hook(lambda *_: told.append("end"))

    def fn() -> tuple[str, Tensor]:
        told.append("inside")
        return "answer", engine.module.norm.weight * 2

    answer, tensor = engine.run(fn)
    assert told == ["begin", "inside", "end"] and answer == "answer" and tensor.shape == (WIDTH,)
    assert any(module is engine.module for module in engine.root.modules())

    def fails() -> None:
        raise KeyError("of the caller")

    with refused(KeyError, "of the caller"):
        engine.run(fails)


def one_rank_agrees_with_itself(factory: Factory, folder: Path) -> None:
    """In one process alone: an engine of several ranks needs a test in several processes besides."""
    engine = new(factory)
    assert engine.agree(True) is True and engine.agree(False) is False
    assert engine.sum([1, 2.5, -0.1]) == engine.max([1, 2.5, -0.1]) == [1.0, 2.5, -0.1]
    assert engine.sum([]) == engine.max([]) == []
    assert all(type(number) is float for number in engine.sum([1, 2]))


def what_was_offloaded_comes_back(factory: Factory, folder: Path) -> None:
    straight, engine = new(factory), new(factory)
    for one in (straight, engine):
        train(one, range(2))
        accumulate(one, batch(5))
    engine.offload()
    assert_same(weights(engine), weights(straight))
    with torch.no_grad():
        assert engine.run(lambda: loss_of(engine.module, batch(3), 60)).isfinite()
    (folder / "away").mkdir()
    engine.save(folder / "away")
    saved = new(factory, seed=3)
    saved.load(folder / "away")
    assert_same(weights(saved), weights(straight))
    engine.reload()
    for one in (straight, engine):
        accumulate(one, batch(6))
    assert engine.step() == straight.step()
    assert train(engine, [7]) == train(straight, [7])
    assert_same(weights(engine), weights(straight))


class refused:
    """``pytest.raises`` whose own complaint is an AssertionError, as that of any other check."""

    def __init__(self, error: type[Exception], match: str):
        self.error, self.match = error, match

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> bool:
        assert kind is not None, f"no {self.error.__name__} was raised"
        if not isinstance(error, self.error):
            return False
        assert re.search(self.match, str(error), re.DOTALL), f"{self.match!r} is not in {str(error)!r}"
        return True


EXACT = (
    gradients_are_those_of_autograd,
    a_gradient_may_come_back_through_the_engine,
    the_cut_into_micro_batches_changes_nothing,
    updates_are_those_of_adamw,
)
CHECKS = (
    a_step_counts_and_tells,
    gradients_are_cleared_by_a_step,
    verify_keeps_and_discard_drops_what_was_accumulated,
    what_is_not_finite_is_refused_by_name,
    what_has_no_gradient_stays,
    what_is_saved_goes_on_to_the_bit,
    another_models_checkpoint_is_refused,
    named_weights_are_whole_and_all,
    run_calls_the_root,
    one_rank_agrees_with_itself,
    what_was_offloaded_comes_back,
)
