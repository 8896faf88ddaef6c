from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.data import writers
from prism_fast.data.readers import read_sharegpt, read_tasks
from prism_fast.data.samples import Demonstration, Task
from prism_fast.data.writers import write_sharegpt, write_tasks

TEXT, IMAGE = {"type": "text", "text": " é?\n"}, {"type": "image"}


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8))


def messages(images: int) -> list[dict]:
    user = [IMAGE] * images + [TEXT] if images else "only text"
    return [{"role": "system", "content": "s"}, {"role": "user", "content": user}]


def demonstrations() -> list[Demonstration]:
    return [Demonstration(f"u{n}", messages(n % 3), f"r\n{n}", [image(i) for i in range(n % 3)]) for n in range(7)]


def tasks() -> list[Task]:
    def one(n: int) -> Task:
        texts = (None, None, None) if n == 2 else ("<caption>é</caption>", "cot", "all")
        equal = ("4", "IV") if n % 2 else ()
        named = {"kind": None, "cluster": None} if n == 3 else {"kind": "sum", "cluster": f"c{n}"}
        pictures = [image(10 * n + i) for i in range(n % 3)]
        return Task(f"t{n}", messages(n % 3), pictures, "mm_gad", "4", equal, "q", *texts, **named, extra={"index": n})

    return [one(n) for n in range(6)]


def test_sharegpt_round_trip(tmp_path):
    write_sharegpt(tmp_path / "new" / "a.json", demonstrations())
    assert list(read_sharegpt(tmp_path / "new" / "a.json")) == demonstrations()
    assert len(list((tmp_path / "new" / "images").iterdir())) == 2  # equal images are stored once


def test_images_of_equal_bytes_and_other_shape_stay_apart(tmp_path):
    pictures = [Image.frombytes("L", size, bytes(range(6))) for size in ((2, 3), (3, 2))]
    samples = [Demonstration(f"u{n}", messages(1), "r", [picture]) for n, picture in enumerate(pictures)]
    write_sharegpt(tmp_path / "a.json", samples)
    assert [sample.images[0].size for sample in read_sharegpt(tmp_path / "a.json")] == [(2, 3), (3, 2)]


def test_tasks_round_trip(tmp_path):
    write_tasks(tmp_path / "a.parquet", tasks(), rows_per_group=2)
    assert list(read_tasks(tmp_path / "a.parquet", require_teacher=False)) == tasks()
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.metadata.num_row_groups == 3
    published = {"prompt", "images", "data_source", "teacher_caption", "teacher_cot", "teacher_response", "answer"}
    assert set(file.schema_arrow.names) == published | {"reward_model", "extra_info"}
    reward = file.schema_arrow.field("reward_model").type
    assert [reward.field(i).name for i in range(3)] == ["ground_truth", "style", "equivalent_answers"]
    first = file.read_row_group(0).to_pylist()[0]
    assert first["reward_model"] == {"ground_truth": "4", "style": "rule", "equivalent_answers": ["__EMPTY__"]}


def test_same_samples_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_sharegpt(tmp_path / name / "a.json", demonstrations())
        write_tasks(tmp_path / name / "a.parquet", tasks())
    contents = [
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two")
    ]
    assert contents[0] == contents[1]
    assert {"a.json", "a.parquet"} < set(contents[0])


@pytest.mark.parametrize(("write", "samples"), [(write_sharegpt, demonstrations), (write_tasks, tasks)])
def test_existing_files_are_never_overwritten(tmp_path, write, samples):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="file exists already and is never overwritten"):
        write(path, samples())
    assert path.read_text() == "precious"


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(table, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(writers.pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tasks(tmp_path / "a.parquet", tasks())
    assert list(tmp_path.iterdir()) == []


def test_what_the_formats_cannot_say_is_refused(tmp_path):
    sample = demonstrations()[0]
    literal = [{"role": "user", "content": "what does <image> mean?"}]
    with pytest.raises(ValueError, match="holds a literal marker"):
        write_sharegpt(tmp_path / "a.json", [replace(sample, messages=literal)])
    with pytest.raises(ValueError, match="part of type 'video'"):
        video = [{"role": "user", "content": [{"type": "video"}]}]
        write_sharegpt(tmp_path / "a.json", [replace(sample, messages=video)])
    with pytest.raises(ValueError, match="task 't0': extra holds kind, uid"):
        write_tasks(tmp_path / "a.parquet", [replace(tasks()[0], extra={"uid": 1, "kind": "x", "index": 0})])
    with pytest.raises(pa.ArrowException):
        mixed = [replace(task, extra={"x": value}) for task, value in zip(tasks(), (1, "y"), strict=False)]
        write_tasks(tmp_path / "a.parquet", mixed)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
