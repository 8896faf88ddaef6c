"""First use with data of one's own: two or three lines of YAML, a run, and a resume that notices changed rows."""

from __future__ import annotations

import json
from io import BytesIO, StringIO
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from rich.console import Console

from prism_fast.config import load_config
from prism_fast.train import sft as sft_stage
from prism_fast.train.checkpoint import CheckpointError
from prism_fast.train.pipeline import run_stages

ANSWER = "<caption>\na square\n</caption>\n<think>\nIt is {shade}.\n</think>\n<answer>\n{shade}\n</answer>"
TINY = ["threads=1", "model.tiny.vocab_size=500", "model.tiny.num_layers=1", "sft.batch=4", "sft.max_updates=4"]
TINY += ["sft.eval_every=2", "rlvr.steps=2", "rlvr.prompts=2", "rlvr.rollout.n=2", "rlvr.rollout.max_new_tokens=4"]
datasets.disable_progress_bars()


def square(shade: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (shade, shade, shade))


def run(recipe: Path, lines: str, *overrides: str, resume: bool = False) -> tuple[Path, str]:
    """The run directory, and all that the console showed."""
    recipe.write_text(lines)
    console = Console(file=StringIO(), width=1000)
    folder = run_stages(load_config(str(recipe), [*TINY, *overrides]), console, resume=resume)
    return folder, console.file.getvalue()


def write_llava(path: Path, order: range) -> None:
    for n in order:
        square(n).save(path.parent / f"{n}.png")
    said = [(f"<image>\nWhich shade, {n}?", ANSWER.format(shade=n)) for n in order]
    turns = [[{"from": "human", "value": ask}, {"from": "gpt", "value": answer}] for ask, answer in said]
    records = [{"id": "1", "image": f"{n}.png", "conversations": t} for n, t in zip(order, turns, strict=True)]
    path.write_text(json.dumps(records))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("llava")
    write_llava(folder / "llava.json", range(20))
    lines = f"stages: [sft]\ndata: {{sft: {folder / 'llava.json'}}}\n"
    return run(folder / "recipe.yaml", lines, "data.validation_split=0.2", f"out={folder / 'run'}")


def test_llava_json_to_sft(trained):
    folder, shown = trained
    assert "data.sft: 16 samples to train on, 4 to validate (data.validation_split=0.2)" in shown
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("sft/val_loss" in line for line in lines) == 2 and (folder / "export/sft/model.safetensors").is_file()


def test_a_raw_hub_folder_to_rlvr(trained, tmp_path):
    """Two shards of (images, problem, answer), as geometry3k has them; the rules grade rows without a data_source."""
    features = Features({"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")})
    (tmp_path / "geo/data").mkdir(parents=True)
    for number in range(2):
        buffer = BytesIO()
        square(number).save(buffer, "PNG")
        columns = {"images": [[{"bytes": buffer.getvalue(), "path": None}]] * 4, "answer": ["7"] * 4}
        columns["problem"] = [f"<image>Find $x_{n}$." for n in range(4)]
        shard = Dataset.from_dict(columns, features=features)
        shard.to_parquet(tmp_path / f"geo/data/train-0000{number}-of-00002.parquet")
    policy = f"stages: [rlvr]\nmodel: {{policy: {trained[0] / 'export/sft'}}}\n"
    data = f"data: {{rlvr: {tmp_path / 'geo'}, system_prompt: published}}\n"
    folder, shown = run(tmp_path / "recipe.yaml", policy + data, f"out={tmp_path / 'run'}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "rlvr"] == [1, 2]
    assert "do not ask for" not in shown
    data = data.replace(", system_prompt: published", "")
    folder, shown = run(tmp_path / "recipe.yaml", policy + data, f"out={tmp_path / 'unasked'}", "rlvr.steps=1")
    assert "data.rlvr: 8 of 8 prompts" in shown and "do not ask for <caption>, <think> and <answer>" in shown


@pytest.mark.parametrize("change", ["another order", "nothing"])
def test_a_resume_notices_rows_in_another_order(change, tmp_path, monkeypatch):
    write_llava(tmp_path / "llava.json", range(12))
    lines = f"stages: [sft]\ndata: {{sft: {tmp_path / 'llava.json'}}}\n"
    settings = [f"out={tmp_path / 'run'}", "checkpoint_every=1", "data.validation_split=0.2"]
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="power cut"):
        broken.setattr(
            sft_stage.SftTrainer, "validate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut"))
        )
        run(tmp_path / "recipe.yaml", lines, *settings)
    if change == "nothing":
        assert run(tmp_path / "recipe.yaml", lines, *settings, resume=True)[0].is_dir()
        return
    write_llava(tmp_path / "llava.json", range(11, -1, -1))
    with pytest.raises(CheckpointError, match=r"data.sft: the rows, or their order, are not those of sft-000001.*back"):
        run(tmp_path / "recipe.yaml", lines, *settings, resume=True)


def test_weights_mix_data_sets(tmp_path, monkeypatch):
    """Three quarters of every batch come from the smaller set."""
    for name, order in (("small", range(3)), ("large", range(100, 140))):
        (tmp_path / name).mkdir()
        write_llava(tmp_path / name / "llava.json", order)
    seen = []
    original = sft_stage.encode
    monkeypatch.setattr(sft_stage, "encode", lambda demos, *more: seen.append(list(demos)) or original(demos, *more))
    sources = [{"path": str(tmp_path / name / "llava.json"), "weight": w} for name, w in (("small", 3), ("large", 1))]
    lines = f"stages: [sft]\ndata: {{sft: {json.dumps(sources)}, validation_split: 0.1}}\n"
    run(tmp_path / "recipe.yaml", lines, f"out={tmp_path / 'run'}")
    batches = [batch for batch in seen if len(batch) == 4][-4:]
    assert [sum(demo.images[0].getpixel((0, 0))[0] < 100 for demo in batch) for batch in batches] == [3, 3, 3, 3]
