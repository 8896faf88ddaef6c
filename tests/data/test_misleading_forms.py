"""Data that is not what it seems: each is refused with what it is, where, and the cure."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.config import ConfigError, load_config
from prism_fast.data.problems import DataError
from prism_fast.train.reading import DataFiles, open_samples

USER, REPLY = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}
MARKED = {"role": "user", "content": "<image>What is it?"}
TASK = {"problem": "What is it?", "answer": "A cat"}
datasets.disable_progress_bars()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was opened')",))


def text(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def rows(name: str, *records: dict):
    return text(name, json.dumps(records))


def parquet(name: str, *records: dict):
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records), folder / name)

    return write


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("inner.zip", b"PK\x03\x04")


def saved_splits(folder: Path) -> None:
    one = datasets.Dataset.from_list([TASK])
    datasets.DatasetDict(dev=one, extra=one).save_to_disk(folder / "saved")


def folder_of(*names: str):
    def write(folder: Path) -> None:
        (folder / "set").mkdir()
        for name in names:
            (folder / "set" / name).write_text("x")

    return write


def llama_factory(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    (folder / "set/mine.json").write_text(json.dumps([{"messages": [USER, REPLY]}]))


def damaged_image_folder(folder: Path) -> None:
    Image.new("L", (2, 2)).save(folder / "a.png")


# name -> (what writes it, the key of the recipe, its value, words of the error in order)
FORMS = {
    "nothing": (text("a.json", ""), "sft", "a.json", ["a.json", "not valid JSON"]),
    "a typing error in the name": (
        rows("train.json", TASK),
        "rlvr",
        "trian.json",
        ["data.rlvr: trian.json does not exist; there is train.json"],
    ),
    "an empty list": (text("a.json", "[]"), "sft", "a.json", ["a.json: holds no rows", "Give a file with samples"]),
    "no rows": (text("a.jsonl", "\n\n"), "sft", "a.jsonl", ["a.jsonl: holds no rows"]),
    "an empty parquet file": (text("a.parquet", ""), "rlvr", "a.parquet", ["a.parquet: is empty", "Write it"]),
    "a table of commas": (
        text("a.csv", "problem,answer\n1+1,2\n"),
        "rlvr",
        "a.csv",
        ["a.csv: is a table of comma-separated text", "writes JSON lines"],
    ),
    "an archive in an archive": (zipped, "rlvr", "data.zip", ["data.zip: is an archive", "Unpack it"]),
    "packed lines": (
        text("a.jsonl.gz", gzip.compress(b"{}")),
        "sft",
        "a.jsonl.gz",
        ["a.jsonl.gz: is an archive", "Unpack it"],
    ),
    "packed lines without the suffix": (text("a.jsonl", gzip.compress(b"{}")), "sft", "a.jsonl", ["is an archive"]),
    "a pickle": (text("a.pkl", pickle.dumps(Bomb())), "rlvr", "a.pkl", ["is a pickle", "never opened here"]),
    "a pickle called JSON": (text("a.json", pickle.dumps(Bomb())), "rlvr", "a.json", ["a.json: is a pickle"]),
    "a tensor file": (text("a.pt", b"PK\x03\x04rest"), "sft", "a.pt", ["is a pickle", "write parquet"]),
    "a pointer of git-LFS": (
        text("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "rlvr",
        "a.parquet",
        ["a.parquet: is a pointer of git-LFS", "git lfs pull"],
    ),
    "a web page": (
        text("a.json", "<!DOCTYPE html><html>"),
        "sft",
        "a.json",
        ["a.json: is an HTML page", "Download the file itself"],
    ),
    "JSON called parquet": (
        rows("a.parquet", TASK),
        "rlvr",
        "a.parquet",
        ["not a parquet file but JSON text", ".json"],
    ),
    "a list under a key": (
        text("a.json", json.dumps({"data": [{"messages": [USER, REPLY]}]})),
        "sft",
        "a.json",
        ["a.json: is of type dict, wanted a list", "under 'data'"],
    ),
    "tasks for SFT": (
        parquet("a.parquet", {**TASK, "n": 1}),
        "sft",
        "a.parquet",
        ["a.parquet: 'problem' and 'answer' are fields of tasks", "data.rlvr", "wanted demonstrations", "'messages'"],
    ),
    "demonstrations for RLVR": (
        rows("a.json", {"messages": [USER, REPLY]}),
        "rlvr",
        "a.json",
        ["a.json, row 0: 'messages' are fields of demonstrations, for data.sft"],
    ),
    "other names of columns": (
        parquet("a.parquet", {"query": "1+1", "gold": "2"}),
        "rlvr",
        "a.parquet",
        [
            "a.parquet: wanted one of 'prompt' and 'reward_model', 'problem'",
            "(the file has: query, gold)",
            "data.columns.",
        ],
    ),
    "half of a format": (
        rows("a.json", {"instruction": "Add.", "response": "2"}),
        "sft",
        "a.json",
        ["row 0: field 'output': is missing (it has: instruction, response)", "data.columns.output"],
    ),
    "turns of another name": (
        rows("a.json", {"dialog": [USER, REPLY]}),
        "sft",
        "a.json",
        ["row 0: wanted one of", "(it has: dialog)", "data.columns.conversations=dialog"],
    ),
    "images under an unknown name": (
        rows("a.json", {"messages": [USER, REPLY], "picture": "a.png"}),
        "sft",
        "a.json",
        ["row 0: field 'picture': looks like images and is not read", "data.columns.images=picture"],
    ),
    "images under an unknown name, with a marker": (
        rows("a.json", {"messages": [MARKED, REPLY], "photo": ["a.png"]}),
        "sft",
        "a.json",
        ["row 0: field 'photo': looks like images", "data.columns.images=photo"],
    ),
    "encoded images under an unknown name": (
        parquet("a.parquet", {**TASK, "decoded": {"bytes": b"x", "path": None}}),
        "rlvr",
        "a.parquet",
        ["a.parquet: field 'decoded': looks like images", "data.columns.images=decoded"],
    ),
    "images under two names": (
        rows("a.json", {"messages": [MARKED, REPLY], "image": "a.png", "images": ["a.png"]}),
        "sft",
        "a.json",
        ["row 0: field 'image': holds images, and so does 'images'", "data.columns.images="],
    ),
    "an image without a marker": (
        rows("a.json", {"messages": [USER, REPLY], "image": "a.png"}),
        "sft",
        "a.json",
        ["field 'messages': 0 <image> markers for 1 images", "Write one <image> marker"],
    ),
    "a marker without an image": (
        rows("a.json", {"messages": [MARKED, REPLY]}),
        "sft",
        "a.json",
        ["field 'messages': 1 <image> markers for 0 images", "Give the images in 'images'"],
    ),
    "videos": (
        rows("a.json", {"messages": [USER, REPLY], "video": "a.mp4"}),
        "sft",
        "a.json",
        ["'video'", "Use images"],
    ),
    "tools": (
        rows("a.json", {"messages": [USER, REPLY], "tools": "[{}]"}),
        "sft",
        "a.json",
        ["'tools'", "are not read"],
    ),
    "base64": (
        rows("a.json", {"messages": [MARKED, REPLY], "images": ["iVBORw0KGgo" + "A" * 60]}),
        "sft",
        "a.json",
        ["field 'images[0]': is base64 text", "Decode it"],
    ),
    "an address": (
        rows("a.json", {"messages": [MARKED, REPLY], "image_url": "https://a.b/c.png"}),
        "sft",
        "a.json",
        ["field 'image_url': is a URL", "save the image"],
    ),
    "preferences": (
        rows("a.json", {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}),
        "pairs",
        "a.json",
        ["row 0: field 'chosen': is a preference pair for DPO", "teacher and student"],
    ),
    "a folder without data": (
        folder_of("model.safetensors.index", "notes"),
        "sft",
        "set",
        ["set: is a folder without data files (it holds: model.safetensors.index, notes)"],
    ),
    "a folder of tables": (folder_of("a.csv"), "rlvr", "set", ["a.csv: is a table of comma-separated text"]),
    "a folder of LLaMA-Factory": (
        llama_factory,
        "sft",
        "set",
        ["set: is a folder of several LLaMA-Factory data sets (mine.json)", "Name the file"],
    ),
    "splits without the usual name": (
        saved_splits,
        "rlvr",
        "saved",
        ["saved: field 'split': has the splits dev, extra and none is named 'train'", "{path: saved, split: dev}"],
    ),
    "a split that is not there": (
        saved_splits,
        "rlvr",
        {"path": "saved", "split": "train"},
        ["saved: field 'split': there is no 'train'", "The splits are dev, extra"],
    ),
    "a split of a file": (
        rows("a.json", TASK),
        "rlvr",
        {"path": "a.json", "split": "train"},
        ["a.json: is a file and has no split", "Leave split out"],
    ),
    "a pattern without files": (
        rows("a.json", TASK),
        "rlvr",
        "*.parquet",
        ["*.parquet: no file matches the pattern"],
    ),
    "a column that is not there": (
        parquet("a.parquet", TASK),
        "rlvr",
        {"path": "a.parquet", "columns": {"images": "pics"}},
        ["a.parquet: field 'pics': data.columns.images names this field", "(it has: problem, answer)"],
    ),
    "a column that no row has": (
        rows("a.json", TASK),
        "rlvr",
        {"path": "a.json", "columns": {"images": "pics"}},
        ["a.json: field 'pics': data.columns.images names this field"],
    ),
    "grounding tokens": (
        rows("a.json", {"messages": [USER, {**REPLY, "content": "<|box_start|>(1,2)<|box_end|>"}]}),
        "sft",
        "a.json",
        ["row 0: field 'messages[1]': holds the special token <|box_start|>", "trained as plain letters"],
    ),
    "a typing error in the data source": (
        rows("a.json", {**TASK, "data_source": "hiyouga/geometry_3k"}),
        "rlvr",
        "a.json",
        ["field 'data_source': no reward is known for 'hiyouga/geometry_3k'; is 'hiyouga/geometry3k' meant?"],
    ),
    "a data source that needs a judge": (
        rows("a.json", {**TASK, "data_source": "mm_gad_llm"}),
        "rlvr",
        "a.json",
        ["field 'data_source': no reward is known for 'mm_gad_llm'", "needs a judge"],
    ),
    "a teacher without sections": (
        rows("a.json", {**TASK, "teacher_response": "It is a cat."}),
        "align",
        "a.json",
        ["field 'teacher_response': cannot be cut into <caption>"],
    ),
    "no teacher": (
        parquet("a.parquet", TASK),
        "align",
        "a.parquet",
        ["field 'teacher_response': the column is missing"],
    ),
    "an answer that is a list": (
        rows("a.json", {**TASK, "answer": ["2"]}),
        "rlvr",
        "a.json",
        ["row 0: field 'answer': is of type list, wanted a string"],
    ),
    "turns that are text": (
        parquet("a.parquet", {"messages": json.dumps([USER, REPLY])}),
        "sft",
        "a.parquet",
        ["a.parquet: field 'messages': the column has type string, wanted list<struct<role"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_is_refused(name, tmp_path, monkeypatch):
    write, key, value, words = FORMS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    damaged_image_folder(tmp_path)
    write(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"data: {json.dumps({key: value})}\n")
    config = load_config("recipe.yaml")
    with pytest.raises((DataError, ConfigError)) as caught:
        open_samples(config, key, DataFiles.of(config).need(key, key))
    message = str(caught.value)
    places = [message.find(word) for word in words]
    assert -1 not in places and places == sorted(places), message
    assert len(message) < 1000 and "\n" not in message and "Traceback" not in message


def test_a_hub_name_that_cannot_be_loaded(tmp_path, monkeypatch):
    """A folder that is not there may be a name on the hub: the error says both."""

    def load_dataset(*_, **__):
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    config = load_config("digits", ["data.source=files", "data.rlvr=data/geo3k"])
    with pytest.raises(DataError) as caught:
        open_samples(config, "rlvr", "data/geo3k")
    words = ["data/geo3k: is neither a file or folder here", "Hugging Face hub (ConnectionError: no network here)"]
    assert all(word in str(caught.value) for word in [*words, "download the data set"])
