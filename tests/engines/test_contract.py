"""The DeepSpeed engine under the engines' contract, in one process."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-engines")

from prism_fast.engine.deepspeed import DeepSpeedEngine
from prism_fast.engine.local import LocalEngine
from tests.contracts.engine import CHECKS, EXACT, Factory, assert_same
from tests.engines.cases import HALF, OPTIMIZER, UNSHARDED, dump, model_of, stepper

pytestmark = pytest.mark.long


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("check", CHECKS + EXACT, ids=_name)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float32(check, stage, tmp_path, one_rank):
    check(Factory(partial(DeepSpeedEngine, stage=stage, options=UNSHARDED), torch.float32), tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16(check, stage, tmp_path, one_rank):
    check(Factory(partial(DeepSpeedEngine, stage=stage, options=UNSHARDED), torch.bfloat16), tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
def test_float32_weights_of_a_half_model(stage, tmp_path, one_rank):
    """A discriminator's head is not rounded, learns, and is in checkpoints that the local engine reads."""
    data, case = dump(), HALF[1]

    def made(kind: type, seed: int):
        options = {} if kind is LocalEngine else {"stage": stage, "options": UNSHARDED}
        engine = kind(model_of(case, data, seed=seed), OPTIMIZER, **options)
        return engine, stepper(case, engine, data, range(6))

    engine, step = made(DeepSpeedEngine, 1)
    step()
    engine.save(tmp_path)
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    head = weights["v_head.1.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    step()
    for kind in (DeepSpeedEngine, LocalEngine):
        other, again = made(kind, 5)
        other.load(tmp_path)
        assert_same(dict(other.named_weights()), weights)
        again()
        after = dict(other.named_weights())["v_head.1.weight"]
        assert not torch.equal(after, head)
        torch.testing.assert_close(after, dict(engine.named_weights())["v_head.1.weight"], rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize("stage", [1, 3])
def test_on_a_card(check, stage, tmp_path, one_rank):
    factory = Factory(partial(DeepSpeedEngine, stage=stage, options=UNSHARDED), torch.bfloat16, torch.device("cuda"))
    check(factory, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_closed_engine_holds_no_memory(stage, dtype, one_rank):
    """DeepSpeed's own objects are never collected; without `close` each stage of a run would keep its masters."""

    def held() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def mean_square(module, inputs):
        return module(inputs).float().square().mean()

    before = held()
    module = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(4))).to(dtype)
    size = sum(p.nbytes for p in module.parameters())
    engine = DeepSpeedEngine(module, OPTIMIZER, stage=stage, options=UNSHARDED)
    engine.backward(engine.run(partial(mean_square, module, torch.ones(2, 300, dtype=dtype))))
    engine.step()
    during = held()
    engine.close()
    del engine, module
    assert during - before > 3 * size and held() - before < size / 4
