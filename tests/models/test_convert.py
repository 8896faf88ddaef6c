"""Converted checkpoint folders: every bit in its place, whole or not at all, and refusals that name the cure."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from prism_fast.models import convert, shards
from prism_fast.models.checkpoints import weight_files
from prism_fast.models.convert import from_released, to_released, upcycle_folder
from prism_fast.models.discriminator import HEAD_KEY, build_discriminator, load_discriminator
from prism_fast.models.policy import build_tiny_policy, load_policy, save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.shards import save_shards
from prism_fast.models.writing import whole_folder
from tests.support.small_policy import SMALL


@pytest.fixture(scope="module")
def dense(policy, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "policy"
    save_policy(copy.deepcopy(policy).to(torch.bfloat16), processor, folder)
    return folder


@pytest.fixture(scope="module")
def released(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "discriminator"
    upcycle_folder(dense, folder, seed=5)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def reshard(folder: Path, size: int = 40_000) -> int:
    state = tensors(folder)
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(state, folder, max_shard_size=size, metadata={"format": "pt"})
    return len(weight_files(folder))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def test_upcycling_a_folder_is_building_a_discriminator(dense, released):
    found = load_discriminator(released, dtype=torch.bfloat16)
    wanted = build_discriminator(load_policy(dense, dtype=torch.bfloat16), seed=5)
    assert same(found.state_dict(), wanted.state_dict())
    assert {t.dtype for name, t in tensors(released).items() if name != HEAD_KEY} == {torch.bfloat16}
    assert json.loads((released / "config.json").read_text())["dtype"] == "bfloat16"
    assert Processor.from_pretrained(released).eos_id == Processor.from_pretrained(dense).eos_id


def test_upcycling_takes_its_options_and_its_seed(dense, released, tmp_path):
    upcycle_folder(dense, tmp_path / "same", seed=5)
    upcycle_folder(dense, tmp_path / "other", seed=6)
    upcycle_folder(dense, tmp_path / "exact", seed=5, num_experts=3, top_k=1, noise_std=0.0, router_std=0.5)
    assert same(tensors(tmp_path / "same"), tensors(released))
    assert not torch.equal(tensors(tmp_path / "other")[HEAD_KEY], tensors(released)[HEAD_KEY])
    text = load_discriminator(tmp_path / "exact").backbone.config.text_config
    assert (text.num_experts, text.num_experts_per_tok) == (3, 1)
    state = tensors(tmp_path / "exact")
    experts = state["model.language_model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(experts[0], experts[2])
    assert 0.3 < state["model.language_model.layers.0.mlp.gate.weight"].float().std() < 0.7


@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_keeps_every_bit_and_every_file(released, tmp_path, sharded):
    source = tmp_path / "source"
    shutil.copytree(released, source)
    if sharded:
        assert reshard(source) > 3
    from_released(source, tmp_path / "stock")
    to_released(tmp_path / "stock", tmp_path / "back")
    stock, back = tensors(tmp_path / "stock"), tensors(tmp_path / "back")
    assert same(back, tensors(source))
    turned = [name for name in stock if not torch.equal(stock[name].flatten(), back[name].flatten())]
    assert turned == [name for name in stock if ".mlp.experts." in name] and len(turned) == 4
    assert all(torch.equal(stock[name], back[name].transpose(1, 2)) for name in turned)
    assert [p.name for p in weight_files(tmp_path / "back")] == [p.name for p in weight_files(source)]
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in source.iterdir()}
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    side = torch.load(tmp_path / "back/value_head.pt", weights_only=True)["v_head.summary.weight"]
    assert torch.equal(side, back[HEAD_KEY])
    assert str(tmp_path) not in (tmp_path / "stock/config.json").read_text()
    wanted = load_discriminator(source).state_dict()
    for name in ("stock", "back"):
        assert same(load_discriminator(tmp_path / name).state_dict(), wanted)


def test_what_stock_transformers_saves_becomes_a_released_folder(released, tmp_path):
    """The stock class drops the head on its way; put back, the folder is a discriminator again."""
    stock = Qwen3VLMoeForConditionalGeneration.from_pretrained(released, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=rf"has no {HEAD_KEY}"):
        to_released(tmp_path / "stock", tmp_path / "headless")
    assert not (tmp_path / "headless").exists()
    state = tensors(tmp_path / "stock") | {HEAD_KEY: tensors(released)[HEAD_KEY]}
    save_file(state, tmp_path / "stock/model.safetensors", metadata={"format": "pt"})
    to_released(tmp_path / "stock", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(released))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_an_output_matrix_of_its_own_stays_untied(released, tmp_path):
    source = tmp_path / "untied"
    from_released(released, source)
    state = tensors(source)
    state["lm_head.weight"] = torch.randn_like(state["model.language_model.embed_tokens.weight"])
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (source / "config.json").write_text(json.dumps(config))
    to_released(source, tmp_path / "back")
    loaded = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])


def test_refusals_name_what_is_wrong(dense, released, tmp_path):
    stock = tmp_path / "stock"
    from_released(released, stock)
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty").mkdir()
    half = tmp_path / "half"
    shutil.copytree(released, half)
    state = tensors(half)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    save_file({**state, name: state[name].transpose(1, 2).contiguous()}, half / "model.safetensors")
    bent = tmp_path / "bent"
    shutil.copytree(released, bent)
    save_file({**state, name: state[name][:, :-1].contiguous()}, bent / "model.safetensors")
    damaged = tmp_path / "damaged"
    shutil.copytree(released, damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:900])
    out = tmp_path / "out"
    cases = [
        (to_released, released, out, ValueError, "already in the released layout"),
        (from_released, stock, out, ValueError, "already in the stock layout"),
        (from_released, half, out, ValueError, "partly in the stock layout"),
        (from_released, bent, out, ValueError, r"layers.1.mlp.experts.down_proj in .* has shape"),
        (from_released, damaged, out, ValueError, r"damaged.model.safetensors is damaged"),
        (from_released, dense, out, ValueError, "convert upcycle"),
        (from_released, tmp_path / "nowhere", out, FileNotFoundError, "nowhere does not exist"),
        (from_released, tmp_path / "empty", out, FileNotFoundError, "config.json is missing"),
        (from_released, released, tmp_path / "taken", FileExistsError, "taken exists already"),
        (lambda s, d: upcycle_folder(s, d, seed=1), released, out, ValueError, "qwen3_vl_moe"),
        (lambda s, d: upcycle_folder(s, d, seed=1, top_k=9), dense, out, ValueError, "top_k"),
        (lambda s, d: upcycle_folder(s, d, seed=1), dense, tmp_path / "taken", FileExistsError, "taken exists"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for action, source, destination, error, message in cases:
        with pytest.raises(error, match=message):
            action(source, destination)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not list((tmp_path / "taken").iterdir())


def test_a_shard_that_is_missing_or_outside_is_named(released, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(released, source)
    reshard(source)
    gone = weight_files(source)[1]
    gone.rename(tmp_path / gone.name)
    with pytest.raises(FileNotFoundError, match=gone.name):
        from_released(source, tmp_path / "out")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(gone.name, f"../{gone.name}"))
    with pytest.raises(ValueError, match=r"\.\./.*must be in the folder itself"):
        from_released(source, tmp_path / "out")
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not a shard index"):
        from_released(source, tmp_path / "out")


def test_a_conversion_that_breaks_off_leaves_nothing(released, tmp_path, monkeypatch):
    written = []

    def full_disk(state, path, metadata):
        written.append(path)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left for .*/out .it takes"):
        from_released(released, tmp_path / "out")
    assert written and not list(tmp_path.iterdir())


def test_weights_are_turned_round_one_file_at_a_time(tmp_path, monkeypatch):
    """Six experts' worth of views in files of two: never more than one file's copies at once, and every bit arrives."""
    stored = {f"t{k}": torch.randn(2, 30, 50) for k in range(6)}
    one = stored["t0"].nbytes
    (tmp_path / "model.safetensors").write_bytes(b"of another day")
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"of another day")
    (tmp_path / "part-7.safetensors").write_bytes(b"of a call that broke off")
    sizes = []
    write = shards.save_file
    monkeypatch.setattr(
        shards,
        "save_file",
        lambda state, *a, **o: sizes.append(sum(t.nbytes for t in state.values())) or write(state, *a, **o),
    )
    save_shards(((name, x.transpose(1, 2)) for name, x in stored.items()), tmp_path, shard_bytes=2 * one)
    assert sizes == [2 * one] * 3 and len(list(tmp_path.glob("*.safetensors"))) == 3
    assert same(tensors(tmp_path), {name: x.transpose(1, 2).contiguous() for name, x in stored.items()})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored) and index["metadata"]["total_size"] == 6 * one
    save_shards(stored.items(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and same(tensors(tmp_path), stored)


PEAK = """
import sys
from pathlib import Path
from prism_fast.models.convert import upcycle_folder
from prism_fast.models.shards import save_shards

def resident(field):
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024

upcycle_folder(sys.argv[1], sys.argv[2] + "/warm", seed=1)  # libraries load
save_shards.__defaults__ = (20_000_000,)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
upcycle_folder(sys.argv[3], sys.argv[2] + "/real", seed=1)
print(resident("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of a process as Linux has it")
def test_upcycling_does_not_double_the_memory(dense, processor, tmp_path):
    """At its highest point there is the dense model and less than half of the sparse one, whose files are smaller."""
    size = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=2048, num_layers=12)
    save_policy(build_tiny_policy(processor, size, seed=1), processor, tmp_path / "policy")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(dense), str(tmp_path), str(tmp_path / "policy")],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bytes_of = {name: sum(f.stat().st_size for f in weight_files(tmp_path / name)) for name in ("policy", "real")}
    assert bytes_of["real"] > 2e8
    print(done.stdout, bytes_of)
    assert int(done.stdout) < bytes_of["policy"] + 0.5 * bytes_of["real"], bytes_of


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "folder"
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
        assert not path.exists() and temporary.parent == path.parent
    assert (path / "inner" / "file").read_text() == "x" and len(list(path.parent.iterdir())) == 1
    assert path.stat().st_mode & 0o077 == tmp_path.joinpath("deep").stat().st_mode & 0o077
