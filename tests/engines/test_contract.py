"""The DeepSpeed engine under the engines' contract, in one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-engines")

from prism_fast.engine.deepspeed import DeepSpeedEngine
from tests.contracts.engine import CHECKS, EXACT, Factory
from tests.engines.cases import UNSHARDED

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
