"""What the DeepSpeed engine refuses before it starts anything. Needs no DeepSpeed."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import nn

from prism_fast.engine.deepspeed import DeepSpeedEngine
from prism_fast.engine.deepspeed_config import check_version, deepspeed_config, import_deepspeed
from prism_fast.engine.optimizer import OptimizerConfig


def test_options_go_through_beside_what_the_engine_sets():
    options = {"wall_clock_breakdown": True, "zero_optimization": {"stage3_prefetch_bucket_size": 7}}
    found = deepspeed_config(3, torch.bfloat16, options)
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert found["zero_optimization"]["stage"] == 3
    assert found["bf16"] == {"enabled": True} and found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert options == {"wall_clock_breakdown": True, "zero_optimization": {"stage3_prefetch_bucket_size": 7}}
    # stage 1 in bfloat16 is another optimizer of DeepSpeed's
    stages = {
        (stage, dtype): deepspeed_config(stage, dtype, {})["zero_optimization"]["stage"]
        for stage in (1, 2, 3)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert [stages[stage, torch.float32] for stage in (1, 2, 3)] == [1, 2, 3]
    assert [stages[stage, torch.bfloat16] for stage in (1, 2, 3)] == [2, 2, 3]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": False}}, "bf16"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
    ],
)
def test_an_option_that_the_engine_sets_is_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"^engine\.deepspeed\.{name} is set by the engine"):
        deepspeed_config(1, torch.float32, options)


@pytest.mark.parametrize("stage", [0, 4, "3"])
def test_another_stage_is_refused(stage):
    with pytest.raises(ValueError, match=r"engine\.stage must be one of 1, 2, 3"):
        deepspeed_config(stage, torch.float32, {})


@pytest.mark.parametrize("version", ["0.19.4", "0.20.0", "0.18.9", "1.0.0", "0.20.0+cu130"])
def test_another_version_is_refused(version):
    with pytest.raises(ImportError, match=rf"does not support DeepSpeed {version.replace('+', '.')}: the cure"):
        check_version(version, "the cure")


@pytest.mark.parametrize("version", ["0.19.5", "0.19.8", "0.19.12", "0.19.8+3f1a2b"])
def test_versions_of_the_line_pass(version):
    check_version(version, "the cure")


def test_a_missing_package_is_told(monkeypatch):
    def imported(name: str, *args, **kwargs):
        if name == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(ImportError, match=r"cannot be imported \(No module .*pip install 'deepspeed>=0\.19\.5,<0\.20'"):
        import_deepspeed()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"takes float32 or bfloat16, got torch\.float.*weight.*set model\.dtype"):
        DeepSpeedEngine(nn.Linear(2, 2, bias=False).to(dtype), OptimizerConfig(), stage=1)
