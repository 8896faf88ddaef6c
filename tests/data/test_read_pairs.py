from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from prism_fast.data.problems import DataError
from prism_fast.data.readers import PUBLISHED_SYSTEM_PROMPT, read_pairs

TEXTS = {"teacher_caption": "tc", "student_caption": "sc", "teacher_cot": "tt", "student_cot": "st"}


def write(folder: Path, *lines: object) -> Path:
    Image.new("L", (5, 4), 9).save(folder / "cat.png")
    path = folder / "pairs.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_published_lines(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "Count.", "image": "cat.png", **TEXTS},
        {"question": "Why?", "prompt": None, "image": None, **TEXTS},
        {"prompt": "Is <image> red?", "image": str(tmp_path / "cat.png"), "system": None, "uid": "u", **TEXTS},
        {"prompt": "x", "system": "S", **TEXTS},
    )
    first, second, third, fourth = read_pairs(path)
    system = {"role": "system", "content": PUBLISHED_SYSTEM_PROMPT}
    image = {"type": "image"}
    assert first.messages == [system, {"role": "user", "content": [image, {"type": "text", "text": "Count."}]}]
    assert first.images[0].size == (5, 4)
    assert {name: getattr(first, name) for name in TEXTS} == TEXTS
    assert second.messages == [system, {"role": "user", "content": "Why?"}] and second.images == []
    parts = [{"type": "text", "text": "Is "}, image, {"type": "text", "text": " red?"}]
    assert third.messages == [{"role": "user", "content": parts}] and len(third.images) == 1
    assert fourth.messages[0] == {"role": "system", "content": "S"}
    assert [pair.uid for pair in (first, second, third, fourth)] == ["pairs-1", "pairs-2", "u", "pairs-4"]
    assert PUBLISHED_SYSTEM_PROMPT.startswith("You are a helpful scientific assistant.\nAnswer the user's question")
    assert PUBLISHED_SYSTEM_PROMPT.endswith("<answer>\n[Final answer ONLY]\n</answer>\n")


BAD_LINES = {
    "bad JSON": ("{prompt: 1}", r"pairs.jsonl, line 2: not valid JSON"),
    "no object": ([1], r"line 2: is of type list, wanted an object"),
    "no prompt": (TEXTS, r"line 2: field 'prompt': is missing \(null\), wanted a string"),
    "empty question": ({"question": "", **TEXTS}, r"line 2: field 'question': is empty"),
    "no student": (
        {"prompt": "x", **{**TEXTS, "student_cot": None}},
        r"line 2: field 'student_cot': is missing \(null\)",
    ),
    "empty teacher": ({"prompt": "x", **{**TEXTS, "teacher_caption": ""}}, r"field 'teacher_caption': is empty"),
    "half a whole response": ({"prompt": "x", "teacher_response": "a"}, r"field 'student_response': is missing"),
    "half of one form": (
        {"prompt": "x", "teacher_response": "a", "student_response": "b", "student_cot": "c"},
        r"line 2: field 'teacher_caption': is missing",
    ),
    "two markers": (
        {"prompt": "<image><image>", "image": "cat.png", **TEXTS},
        r"field 'prompt': 2 <image> markers for 1 images",
    ),
    "marker alone": ({"prompt": "<image>", **TEXTS}, r"field 'prompt': 1 <image> markers for 0 images"),
    "missing image": ({"prompt": "x", "image": "no.png", **TEXTS}, r"'image': image file .*no.png does not exist"),
    "image URL": ({"prompt": "x", "image": "https://x/y.png", **TEXTS}, r"field 'image': is a URL"),
    "system number": ({"prompt": "x", "system": 3, **TEXTS}, r"field 'system': is of type int"),
    "same uid": ({"prompt": "x", "uid": "pairs-1", **TEXTS}, r"'uid': 'pairs-1' is also the uid of .*line 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_refused_by_place_and_field(tmp_path, name):
    content, message = BAD_LINES[name]
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path, {"prompt": "fine", **TEXTS}, content))


def test_missing_file_and_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: the file does not exist"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: holds no rows"):
        read_pairs(tmp_path / "empty.jsonl")


def test_bad_image_and_collected_problems(tmp_path):
    lines = [{"prompt": "x", "image": "bad.png", **TEXTS}, "{", {"prompt": "x", **TEXTS}]
    path = write(tmp_path, *lines)
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    problems: list[DataError] = []
    pairs = read_pairs(path, problems=problems)
    assert [str(problem).split(":")[0].split(", ")[-1] for problem in problems] == ["line 2"]
    with pytest.raises(DataError, match=r"pairs.jsonl, line 1: field 'image': .*bad.png"):
        pairs[0]
    assert pairs[1].uid == "pairs-3"
