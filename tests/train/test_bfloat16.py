"""A stage in bfloat16: it learns as in float32, goes on to the bit, and exports its masters rounded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prism_fast.config import load_config
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.digits import write_digits
from prism_fast.track.metrics import reproducible
from prism_fast.train.pipeline import run_stages
from tests.train.conftest import SMALL, run_small

SFT = [*SMALL, "stages=[sft]", "data.eval=null", "model.dtype=bfloat16"]


def _lines(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(record) for record in records]


def _val_loss(folder: Path) -> float:
    return [line["sft/val_loss"] for line in _lines(folder) if "sft/val_loss" in line][-1]


def test_it_resumes_to_the_bit_and_exports_its_masters_rounded_once(small_data, tmp_path):
    settings = [*SFT, *small_data, "data.eval=null", "sft.max_updates=8", "sft.eval_every=8", "checkpoint_every=4"]
    whole = run_small(tmp_path / "whole", settings)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "sft-000008")
    shutil.rmtree(cut / "export")
    record = json.loads((cut / "record.json").read_text())
    (cut / "record.json").write_text(json.dumps(record | {"completed": [], "policy": None}))
    config = load_config(str(cut / "config.yaml"), [f"out={cut}"])
    run_stages(config, Console(quiet=True), resume=True)
    assert _lines(cut) == _lines(whole) and len(_lines(whole)) >= 8
    weights, again = (load_file(folder / "export/sft/model.safetensors") for folder in (whole, cut))
    saved = load_file(whole / "checkpoints/sft-000008/policy/engine.safetensors")
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, again[name])
        assert torch.equal(tensor, saved[f"model.{name}"].to(torch.bfloat16)), name


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lr", ["2e-5", "1e-4", "1e-3"])
def test_two_hundred_updates_end_where_float32_does(tmp_path, lr):
    """Within 3 % of its validation loss, on images that training does not see (a loss learnt by heart is all noise);
    and they learn."""
    files = write_digits(tmp_path / "digits", DigitsSpec(sft_images=200, sft_val_images=40), seed=3)
    settings = [*SFT, "data.source=files", f"data.sft={files.sft}", f"data.sft_val={files.sft_val}"]
    settings += ["sft.max_updates=200", "sft.eval_every=200", "sft.batch=4"]
    settings += [f"sft.optimizer.lr={lr}", "checkpoint_every=1000"]
    found = {
        dtype: _val_loss(run_small(tmp_path / dtype, [*settings, f"model.dtype={dtype}"]))
        for dtype in ("float32", "bfloat16")
    }
    print(f"lr {lr}: validation loss {found}")
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.03)
    assert found["float32"] < 6.2, "the untrained policy's is ln 600 or more"
