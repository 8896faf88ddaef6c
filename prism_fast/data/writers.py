"""Writers of demonstrations and tasks in the published file formats, each the inverse of its reader.

Files appear complete or not at all, and an existing file is never overwritten (FileExistsError). The same samples give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prism_fast.data.messages import marked_text
from prism_fast.data.samples import Demonstration, Task
from prism_fast.data.tasks import NO_EQUIVALENTS
from prism_fast.models.writing import refuse_existing, whole_file, write_whole

_TEXT = pa.string()
_TASK_FIELDS = [
    ("data_source", _TEXT),
    ("prompt", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", _TEXT)]))),
    ("teacher_response", _TEXT),
    ("teacher_caption", _TEXT),
    ("teacher_cot", _TEXT),
    ("answer", _TEXT),
    (
        "reward_model",
        pa.struct([("ground_truth", _TEXT), ("style", _TEXT), ("equivalent_answers", pa.list_(_TEXT))]),
    ),
]


def encode_png(image: Image.Image) -> bytes:
    """PNG file content of ``image`` (its mode is kept)."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_sharegpt(path: str | Path, demonstrations: Iterable[Demonstration]) -> None:
    """One JSON list, a record per line: ``id``, ``messages`` (``role``/``content``), ``images`` (relative PNG paths).

    Images go to ``images/`` beside the file, named by their content: equal images are stored once.
    """
    path = _new_file(path)
    images = _ImageFolder(path.parent, "images")
    lines = []
    for sample in demonstrations:
        messages = [*_marked(sample.messages), {"role": "assistant", "content": sample.response}]
        record = {"id": sample.uid, "messages": messages, "images": [images.store(image) for image in sample.images]}
        lines.append(json.dumps(record, ensure_ascii=False))
    write_whole(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_tasks(path: str | Path, tasks: Iterable[Task], *, rows_per_group: int = 256) -> None:
    """Parquet with the published columns and inline PNG bytes; small row groups, so that readers can seek.

    ``uid``, ``question``, ``kind``, ``cluster`` and ``extra`` go into ``extra_info``; the values of ``extra`` must have
    one type per name over all tasks (pyarrow's error names the offender otherwise).
    """
    path = _new_file(path)
    rows = [_task_row(task) for task in tasks]
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in _TASK_FIELDS}
    columns["extra_info"] = pa.array([row["extra_info"] for row in rows])
    table = pa.table(columns)
    with whole_file(path) as part:
        pq.write_table(table, part, row_group_size=rows_per_group)


def _task_row(task: Task) -> dict[str, Any]:
    taken = {"uid", "question", "kind", "cluster"} & set(task.extra)
    if taken:
        raise ValueError(f"task {task.uid!r}: extra holds {', '.join(sorted(taken))}, which are fields of Task")
    named = {"uid": task.uid, "question": task.question, "kind": task.kind, "cluster": task.cluster}
    return {
        "data_source": task.data_source,
        "prompt": _marked(task.messages),
        "images": [{"bytes": encode_png(image), "path": None} for image in task.images],
        "teacher_response": task.teacher_response,
        "teacher_caption": task.teacher_caption,
        "teacher_cot": task.teacher_cot,
        "answer": task.ground_truth,
        "reward_model": {
            "ground_truth": task.ground_truth,
            "style": "rule",
            "equivalent_answers": list(task.equivalent_answers) or [NO_EQUIVALENTS],
        },
        "extra_info": {**named, **task.extra},
    }


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": marked_text(message["content"])} for message in messages]


class _ImageFolder:
    """PNG files named by a hash of their pixels, created with the first image."""

    def __init__(self, parent: Path, name: str) -> None:
        self._folder, self._name = parent / name, name
        self._stored: set[str] = set()

    def store(self, image: Image.Image) -> str:
        """Path of the image relative to the folder's parent."""
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        name = f"{hashlib.sha256(content).hexdigest()[:24]}.png"
        if name not in self._stored:
            self._folder.mkdir(exist_ok=True)
            (self._folder / name).write_bytes(encode_png(image))
            self._stored.add(name)
        return f"{self._name}/{name}"


def _new_file(path: str | Path) -> Path:
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
