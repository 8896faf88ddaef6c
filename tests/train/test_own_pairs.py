"""A run's own warm-up pairs: of any task that alignment reads, several images and turns included."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prism_fast.config import ConfigError
from prism_fast.data.readers import read_tasks
from prism_fast.data.samples import Task
from prism_fast.data.writers import write_tasks
from prism_fast.train.own_pairs import OwnPair, read_own_pairs, write_own_pairs
from prism_fast.train.warmup import group_pairs

TEACHER = {"teacher_caption": "<caption>1</caption>", "teacher_cot": "<think>2</think>", "teacher_response": "1 2"}


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def two_image_task(uid: str, seed: int) -> Task:
    """Two images and an assistant's turn."""
    first = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    turns = [("user", first), ("assistant", "Two pictures."), ("user", "Which is larger?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return Task(uid, messages, [image(seed), image(seed + 1)], "mm_gad", "1", **TEACHER)


@pytest.fixture
def tasks(tmp_path):
    write_tasks(tmp_path / "align.parquet", [two_image_task("a", 1), two_image_task("b", 5)])
    return read_tasks(tmp_path / "align.parquet", require_teacher=True)


def own(index: int, uid: str, response: int, text: str) -> OwnPair:
    return OwnPair(index, uid, response, f"<caption>{text}</caption>", f"<think>{text}</think>", text)


def test_pairs_of_several_images_and_turns_come_back_and_make_groups(tasks, tmp_path, processor):
    kept = [own(0, "a", 0, "x\u2028y"), own(0, "a", 3, "z"), own(1, "b", 1, "x")]
    write_own_pairs(tmp_path / "pairs.jsonl", kept)
    pairs = read_own_pairs(tmp_path / "pairs.jsonl", tasks)
    assert [pair.uid for pair in pairs] == ["a-0", "a-3", "b-1"]
    assert pairs[0].student_caption == "<caption>x\u2028y</caption>" and pairs[1].student_response == "z"
    assert (pairs[0].messages, pairs[2].teacher_cot) == (tasks[0].messages, TEACHER["teacher_cot"])
    assert [np.asarray(i).tolist() for i in pairs[2].images] == [np.asarray(image(s)).tolist() for s in (5, 6)]
    assert [len(g.students) for g in group_pairs(pairs, processor, "prism_fast", ("caption", "reasoning"))] == [2, 1]


@pytest.mark.parametrize("pair", [own(0, "b", 0, "x"), own(2, "c", 0, "x")])
def test_pairs_of_other_tasks_are_refused(tasks, tmp_path, pair):
    write_own_pairs(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(ConfigError, match=f"sampled for data.align with task '{pair.uid}' in place {pair.index}"):
        read_own_pairs(tmp_path / "pairs.jsonl", tasks)


def test_a_warm_up_samples_them_for_tasks_of_several_images(finished, run_again, small_data, tmp_path):
    (path,) = [value.partition("=")[2] for value in small_data if value.startswith("data.align=")]
    single = read_tasks(path, require_teacher=True)
    doubled = []
    for task in (single[i] for i in range(12)):
        *before, user = task.messages
        content = [*user["content"], {"type": "image"}]
        doubled.append(replace(task, messages=[*before, user | {"content": content}], images=task.images * 2))
    write_tasks(tmp_path / "two.parquet", doubled)
    folder = run_again(
        tmp_path / "run",
        *(f"model.policy={finished / 'export/sft'}", "stages=[warmup]", "data.eval=null"),
        f"data.align={tmp_path / 'two.parquet'}",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (sampled,) = [line["pairs/kept"] for line in lines if "pairs/kept" in line]
    assert sampled == len((folder / "data" / "pairs.jsonl").read_text().splitlines()) > 0
    assert any("warmup/heldout_margin_caption" in line for line in lines)
