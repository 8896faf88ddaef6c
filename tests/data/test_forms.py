"""Data as people have it, written by `datasets` or as LLaMA-Factory, LLaVA, TRL and verl write it; each loads from two
lines of YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from prism_fast.config import load_config
from prism_fast.data.system_prompt import PUBLISHED_SYSTEM_PROMPT
from prism_fast.data.tasks import DEFAULT_SOURCE
from prism_fast.train.reading import open_samples

ANSWER = "A cat."
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
RESPONSE = "<caption>\nc\n</caption>\n<think>t</think><answer>3</answer>"
datasets.disable_progress_bars()


def png(shade: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def files(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))


def opened(folder: Path, key: str, value: object, **more: object):
    """The samples of a recipe of two lines."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"stages: [rlvr]\ndata: {json.dumps({key: value, **more})}\n")
    config = load_config(str(recipe))
    return open_samples(config, key, getattr(config.data, key))


def shades(samples) -> list[list[int]]:
    return [[image.getpixel((0, 0))[0] for image in sample.images] for sample in samples]


def asked(sample) -> list:
    return [(turn["role"], turn["content"]) for turn in sample.messages]


# Demonstrations


def trl_dataset() -> Dataset:
    """TRL's vision data: typed parts in `messages`, images beside them."""
    part = {"type": Value("string"), "text": Value("string")}
    turn = {"role": Value("string"), "content": List(part)}
    features = Features({"messages": List(turn), "images": List(ImageFeature())})
    user = {"role": "user", "content": [{"type": "image", "text": None}, PARTS[1]]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    images = [[Image.open(BytesIO(png(shade)))] for shade in (0, 1, 2)]
    return Dataset.from_dict({"messages": [[user, reply]] * 3, "images": images}, features=features)


def saved(folder: Path) -> str:
    trl_dataset().save_to_disk(folder / "saved", num_shards=2)
    return "saved"


def saved_with_splits(folder: Path) -> str:
    DatasetDict(train=trl_dataset(), test=trl_dataset().select([0])).save_to_disk(folder / "saved")
    return "saved"


def parquet_folder(folder: Path) -> str:
    (folder / "set/data").mkdir(parents=True)
    shards = [trl_dataset().select(rows) for rows in ([0, 1], [2])]
    for number, shard in enumerate(shards):
        shard.to_parquet(folder / f"set/data/train-0000{number}-of-00002.parquet")
    trl_dataset().select([0]).to_parquet(folder / "set/data/test-00000-of-00001.parquet")
    (folder / "set/README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    return "set"


def arrow_file(folder: Path) -> str:
    trl_dataset().save_to_disk(folder / "saved")
    return "saved/data-00000-of-00001.arrow"


def llava(folder: Path) -> str:
    """LLaVA: one image under `image`, and ids that name it, so that they come twice."""
    files(folder, "coco/0.png", "coco/1.png", "coco/2.png")
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": ANSWER}]
    rows = [{"id": "7", "image": f"coco/{n}.png", "conversations": turns} for n in range(3)]
    (folder / "llava.json").write_text(json.dumps(rows))
    return "llava.json"


def llama_factory(folder: Path) -> str:
    files(folder, "pics/0.png", "pics/1.png", "pics/2.png")
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": ANSWER}]
    rows = [{"conversations": turns, "images": [f"pics/{n}.png"], "system": "", "tools": ""} for n in range(3)]
    (folder / "sharegpt.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    return "sharegpt.json"


def json_lines_named_json(folder: Path) -> str:
    """`Dataset.to_json` writes JSON lines under the name that it is given."""
    files(folder, "0.png", "1.png", "2.png")
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": ANSWER}]
    rows = Dataset.from_list([{"messages": turns, "image": f"{n}.png"} for n in range(3)])
    rows.to_json(folder / "rows.json")
    return "rows.json"


def list_named_jsonl(folder: Path) -> str:
    llava(folder)
    (folder / "llava.json").rename(folder / "rows.jsonl")
    return "rows.jsonl"


def openai(folder: Path) -> str:
    """The image inside its part, as for chat APIs."""
    files(folder, "0.png", "1.png", "2.png")
    lines = []
    for n in range(3):
        parts = [{"type": "image_url", "image_url": {"url": f"{n}.png"}}, PARTS[1]]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return "chat.jsonl"


def alpaca(folder: Path) -> str:
    """LLaMA-Factory's own form; without a marker the image comes first."""
    files(folder, "0.png", "1.png", "2.png")
    row = {"instruction": "What is it?", "input": "", "output": ANSWER, "history": []}
    (folder / "alpaca.json").write_text(json.dumps([{**row, "images": [f"{n}.png"]} for n in range(3)]))
    return "alpaca.json"


def completions(folder: Path) -> str:
    files(folder, "0.png", "1.png", "2.png")
    row = {"prompt": [{"role": "user", "content": PARTS}], "completion": [{"role": "assistant", "content": ANSWER}]}
    lines = [json.dumps({**row, "images": [f"{n}.png"]}) + "\n" for n in range(3)]
    (folder / "trl.jsonl").write_text("".join(lines))
    return "trl.jsonl"


def globbed(folder: Path) -> str:
    for n in range(3):
        trl_dataset().select([n]).to_parquet(folder / f"part-{n}.parquet")
    return "part-*.parquet"


def listed(folder: Path) -> list:
    globbed(folder)
    return ["part-0.parquet", {"path": "part-1.parquet"}, "part-2.parquet"]


FORMS = [saved, saved_with_splits, parquet_folder, arrow_file, llava, llama_factory, json_lines_named_json]
FORMS += [list_named_jsonl, openai, alpaca, completions, globbed, listed]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_demonstrations(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    value = form(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    samples = opened(tmp_path, "sft", value)
    assert [(asked(sample), sample.response) for sample in samples] == [([("user", PARTS)], ANSWER)] * 3
    assert shades(samples) == [[0], [1], [2]]
    assert len({sample.uid for sample in samples}) == 3
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} - before == {tmp_path / "recipe.yaml"}


def test_rounds_system_turns_and_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alpaca = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "S", "history": [["Hi", "Ho"]]}
    trl = {"prompt": "2 + 2?", "completion": "4"}
    (tmp_path / "a.json").write_text(json.dumps([alpaca, trl]))
    first, second = opened(tmp_path, "sft", "a.json")
    assert asked(first) == [("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "Add.\n1, 2")]
    assert (asked(second), second.response) == ([("user", "2 + 2?")], "4")


# Tasks


def geometry(folder: Path) -> str:
    """The raw geometry3k: shards of (images, problem, answer)."""
    features = Features({"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")})
    (folder / "geo/data").mkdir(parents=True)
    for number in range(2):
        image = {"bytes": png(number), "path": None}
        columns = {"images": [[image]], "problem": ["<image>Find $x$."], "answer": ["3"]}
        shard = Dataset.from_dict(columns, features=features)
        shard.to_parquet(folder / f"geo/data/train-0000{number}-of-00002.parquet")
        shard.to_parquet(folder / f"geo/data/validation-0000{number}-of-00002.parquet")
    return "geo"


def verl(folder: Path) -> str:
    """verl's examples/data_preprocess: `Dataset.map` to these columns, then `to_parquet`."""

    def row(number: int) -> dict:
        return {
            "data_source": "my/own_set",
            "prompt": [{"role": "user", "content": "<image>Find $x$."}],
            "images": [{"bytes": png(number), "path": None}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "3"},
            "extra_info": {"split": "train", "index": number, "answer": "3", "question": "Find x."},
        }

    Dataset.from_list([row(0), row(1)]).to_parquet(folder / "train.parquet")
    return "train.parquet"


def question_json(folder: Path) -> dict:
    files(folder, "pics/0.png", "pics/1.png")
    rows = [{"query": "Find $x$.", "picture": f"{n}.png", "gold": 3} for n in range(2)]
    (folder / "rows.json").write_text(json.dumps(rows))
    columns = {"problem": "query", "images": "picture", "answer": "gold"}
    return {"path": "rows.json", "columns": columns, "image_root": "pics"}


@pytest.mark.parametrize("form", [geometry, verl, question_json], ids=lambda form: form.__name__)
def test_tasks(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = opened(tmp_path, "rlvr", form(tmp_path))
    assert [(task.ground_truth, task.data_source) for task in samples] == [("3", DEFAULT_SOURCE)] * 2
    content = [{"type": "image"}, {"type": "text", "text": "Find $x$."}]
    assert [asked(task) for task in samples] == [[("user", content)]] * 2 and shades(samples) == [[0], [1]]
    if form is verl:
        assert samples[0].extra["data_source"] == "my/own_set" and samples[0].question == "Find x."


def test_alignment_from_one_response(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "1 + 2?", "answer": "3", "teacher_response": RESPONSE}))
    (task,) = opened(tmp_path, "align", "a.jsonl")
    assert task.teacher_caption == "<caption>\nc\n</caption>" and task.teacher_response == RESPONSE
    assert task.teacher_cot == "<think>t</think><answer>3</answer>"


def test_a_split_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    geometry(tmp_path)
    chosen = opened(tmp_path, "eval", {"path": "geo", "split": "validation"})
    assert [chosen.place(n).file.name[:10] for n in range(2)] == ["validation"] * 2


# The hub


@pytest.mark.parametrize(("key", "split", "rows"), [("rlvr", None, 3), ("eval", None, 1), ("rlvr", "test", 1)])
def test_hub_names(key, split, rows, tmp_path, monkeypatch):
    """The loader is replaced: tests see no network. Without a split of the recipe the key chooses."""
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})

    def load_dataset(name, config, split):
        assert (name, config) == ("owner/set", None)
        one = {"image": {"bytes": png(9), "path": "a.png"}, "question": "Which?", "answer": "B"}
        splits = {"train": Dataset.from_list([one] * 3, features=features)}
        splits["test"] = Dataset.from_list([one], features=features)
        return splits[split] if split else DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    value = "owner/set" if split is None else {"path": "owner/set", "split": split}
    samples = opened(tmp_path, key, value)
    assert shades(samples) == [[9]] * rows and str(samples.place(0).file) == "owner/set"


# Around the rows


def test_system_prompt_goes_to_rows_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "1 + 2?", "answer": "3", "system": "Mine."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "mine.txt").write_text("From a file.")
    texts = {"published": PUBLISHED_SYSTEM_PROMPT, "Be brief.": "Be brief.", "mine.txt": "From a file."}
    for value, text in texts.items():
        first, second = opened(tmp_path, "rlvr", "a.json", system_prompt=value)
        assert asked(first) == [("system", text), ("user", "1 + 1?")]
        assert asked(second) == [("system", "Mine."), ("user", "1 + 2?")]
    assert asked(opened(tmp_path, "rlvr", "a.json")[0]) == [("user", "1 + 1?")]


def test_own_ids_of_several_data_sets_do_not_clash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": 1, "problem": "1 + 1?", "answer": "2"}]))
    assert [task.uid for task in opened(tmp_path, "rlvr", ["a.json", "b.json"])] == ["0-1", "1-1"]


def test_pairs_of_several_images_and_turns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, "0.png", "1.png")
    turns = [("user", "<image>and<image>?"), ("assistant", "Two."), ("user", "Which is larger?")]
    texts = {f"{side}_{text}": side for side in ("teacher", "student") for text in ("caption", "cot")}
    row = {"prompt": [{"role": role, "content": content} for role, content in turns], **texts}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "images": ["0.png", "1.png"], "system": None}))
    (pair,) = opened(tmp_path, "pairs", "pairs.jsonl")
    assert shades([pair]) == [[0, 1]] and [turn["role"] for turn in pair.messages] == ["user", "assistant", "user"]
    assert pair.messages[0]["content"] == [
        PARTS[0],
        {"type": "text", "text": "and"},
        PARTS[0],
        {"type": "text", "text": "?"},
    ]


def test_datasets_is_imported_only_where_it_is_needed():
    code = "import sys, prism_fast.data.readers, prism_fast.train.reading; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_other_plain_columns_reach_reward_functions(tmp_path):
    """As TRL passes them; `extra_info` wins where both have a name, and what is no number or text stays out."""
    row = {"problem": "Find x.", "answer": "3", "difficulty": 4, "solution": "x = 3", "steps": ["a", "b"]}
    Dataset.from_list([row, {**row, "difficulty": None}]).to_parquet(tmp_path / "a.parquet")
    first, second = opened(tmp_path, "rlvr", str(tmp_path / "a.parquet"))
    assert first.extra == {"difficulty": 4, "solution": "x = 3"} and second.extra == {"solution": "x = 3"}
    verl = {"prompt": "Find x.", "reward_model": {"ground_truth": "3"}, "level": 1, "hard": True}
    (tmp_path / "b.json").write_text(json.dumps([{**verl, "extra_info": {"level": 2}}]))
    assert opened(tmp_path, "rlvr", str(tmp_path / "b.json"))[0].extra == {"level": 2, "hard": True}
