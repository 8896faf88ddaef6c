"""Rows of every format with one value replaced by an odd one: each loads or is a `DataError` of its row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_pairs, read_sharegpt, read_tasks
from prism_fast.data.screen import screen

RESPONSE = "<caption>c</caption><think>t</think><answer>3</answer>"
REPLY = {"role": "assistant", "content": "a"}
PARTS = [{"type": "image"}, {"type": "text", "text": "q"}]


def tasks(path: Path, **options: Any):
    return read_tasks(path, require_teacher=False, known_sources=["mm_gad"], **options)


def aligned(path: Path, **options: Any):
    return read_tasks(path, require_teacher=True, known_sources=["mm_gad"], **options)


ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "conversations": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
        },
        read_sharegpt,
    ),
    "messages": ({"images": ["a.png"], "messages": [{"role": "user", "content": PARTS}, REPLY]}, read_sharegpt),
    "completion": ({"prompt": [{"role": "user", "content": "q"}], "completion": [REPLY]}, read_sharegpt),
    "alpaca": ({"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]]}, read_sharegpt),
    "verl": (
        {
            "prompt": [{"role": "user", "content": "<image>q"}],
            "images": [{"path": "a.png"}],
            "data_source": "mm_gad",
            "reward_model": {"ground_truth": "3", "style": "rule", "equivalent_answers": ["x"]},
            "extra_info": {"index": 1, "kind": "k"},
            "teacher_response": RESPONSE,
        },
        aligned,
    ),
    "problem": ({"problem": "<image>q", "answer": "3", "images": ["a.png"]}, tasks),
    "pair": (
        {
            "prompt": "q",
            "image": "a.png",
            **{f"{side}_{text}": "t" for side in ("teacher", "student") for text in ("caption", "cot")},
        },
        read_pairs,
    ),
}
TURN = {"role": "user", "content": "x"}
ODD: list[Any] = [
    *(None, 0, 1.5, True, 10**30, "", "x", "<image>", "<|im_end|>", "a.png", "data:image/png;base64,xx"),
    *([], ["x"], [[]], [None], [1, 2], [["a.png"]], [{}], {}, {"x": 1}, {"path": None}, {"bytes": "x"}),
    *([{"type": "text"}], [{"role": "user"}], [{**TURN, "content": None}], [{**TURN, "content": [None]}], [TURN]),
    [{**TURN, "content": [{"type": "image", "image": []}]}, REPLY],
    [{**TURN, "content": [{"type": "image_url", "image_url": 5}]}, REPLY],
    *([{"from": "human", "value": "q", "role": "user"}], {"ground_truth": 5}, {"ground_truth": ["3"]}),
]


def mutations(value: Any) -> Iterator[Any]:
    """``value`` with any one part of it replaced by each odd value, or left out."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for changed in mutations(value[key]):
            copy = value.copy()
            copy[key] = changed
            yield copy
        copy = value.copy()
        del copy[key]
        yield copy


@pytest.mark.parametrize("name", ROWS)
def test_odd_rows(name, tmp_path):
    row, read = ROWS[name]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [row, *mutations(row)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    problems: list[DataError] = []
    found = screen(read(tmp_path / "rows.json", problems=problems), problems=problems)
    assert found.samples.place(0).row == "row 0" and len(found.samples) + len(problems) == len(rows)
    assert len(problems) > len(ODD) and {problem.place.file.name for problem in problems} == {"rows.json"}
    assert all(problem.place.row.startswith("row ") and str(problem).endswith(".") for problem in problems)
