from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.data import parquet
from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_tasks
from prism_fast.data.writers import encode_png

DROP = object()


def png_bytes(value: int = 7, size=(5, 4)) -> bytes:
    return encode_png(Image.new("RGB", size, (value, 0, 0)))


def row(**changes) -> dict:
    """One good row, with columns changed or dropped."""
    columns = {
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "images": [{"bytes": png_bytes(), "path": None}],
        "data_source": "mm_gad",
        "teacher_caption": "<caption>c</caption>",
        "teacher_cot": "<think>t</think><answer>3</answer>",
        "teacher_response": "<caption>c</caption><think>t</think><answer>3</answer>",
        "answer": "3",
        "reward_model": {"ground_truth": "3", "style": "rule", "equivalent_answers": ["__EMPTY__"]},
        "extra_info": {"index": 4},
    }
    columns.update(changes)
    return {name: value for name, value in columns.items() if value is not DROP}


def write(folder: Path, rows: list[dict], name: str = "a.parquet", **options) -> Path:
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_published_row(tmp_path):
    extra = {"index": 4, "uid": "u", "kind": "count", "cluster": "c", "question": "How many cats?", "tool": None}
    reward = {"ground_truth": "3", "style": "rule", "equivalent_answers": ["three", "III"]}
    path = write(tmp_path, [row(), row(extra_info=extra, reward_model=reward, answer="about 3")])
    first, second = read_tasks(path, require_teacher=True)
    assert (first.uid, first.kind, first.cluster, first.question) == ("a-0", None, None, "How many?")
    assert first.extra == {"index": 4}
    assert first.equivalent_answers == ()
    assert first.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert first.teacher_cot == "<think>t</think><answer>3</answer>"
    assert first.images[0].getpixel((0, 0)) == (7, 0, 0)
    assert (second.uid, second.kind, second.cluster, second.question) == ("u", "count", "c", "How many cats?")
    assert second.equivalent_answers == ("three", "III")
    assert second.extra == {"index": 4, "answer": "about 3"}


def test_image_columns_of_every_published_form(tmp_path):
    (tmp_path / "red.png").write_bytes(png_bytes(9))
    forms = {
        "struct": [{"bytes": None, "path": "red.png"}],
        "image": [{"image": "red.png"}],
        "paths": ["red.png"],
        "binary": [png_bytes(9)],
    }
    for name, images in forms.items():
        (task,) = read_tasks(write(tmp_path, [row(images=images)], f"{name}.parquet"), require_teacher=False)
        assert task.images[0].getpixel((0, 0)) == (9, 0, 0)
    text_only = row(images=DROP, prompt=[{"role": "user", "content": "2+2?"}], extra_info=DROP, answer=DROP)
    nulls = row(images=None, prompt=[{"role": "user", "content": "2+2?"}], extra_info=None)
    for name, value in (("none", text_only), ("null", nulls)):
        (task,) = read_tasks(write(tmp_path, [value], f"{name}.parquet"), require_teacher=True)
        assert (task.images, task.extra, task.messages[0]["content"]) == ([], {}, "2+2?")


def test_teacher_columns_are_optional_unless_required(tmp_path):
    path = write(tmp_path, [row(teacher_caption=DROP, teacher_cot=None, teacher_response=DROP)])
    (task,) = read_tasks(path, require_teacher=False)
    assert (task.teacher_caption, task.teacher_cot) == (None, None)
    with pytest.raises(DataError, match=r"a.parquet: field 'teacher_response': the column is missing \(the"):
        read_tasks(path, require_teacher=True)
    path = write(tmp_path, [row(), row(teacher_cot="")], "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, row 1: field 'teacher_cot': is empty"):
        read_tasks(path, require_teacher=True)


def test_caption_and_reasoning_are_cut_out_of_the_response(tmp_path):
    whole = "<caption>c</caption>\n<think>t</think>\n<answer>3</answer>"
    path = write(tmp_path, [row(teacher_caption=DROP, teacher_cot=DROP, teacher_response=whole)])
    (task,) = read_tasks(path, require_teacher=True)
    assert (task.teacher_caption, task.teacher_cot) == ("<caption>c</caption>", whole.partition("\n")[2])
    path = write(tmp_path, [row(teacher_caption=None, teacher_cot=None, teacher_response="It is 3.")], "b.parquet")
    with pytest.raises(DataError, match=r"row 0: field 'teacher_response': cannot be cut into <caption>"):
        read_tasks(path, require_teacher=True)
    (task,) = read_tasks(path, require_teacher=False)
    assert (task.teacher_caption, task.teacher_response) == (None, "It is 3.")


def test_only_the_blocks_that_are_needed_are_decoded(tmp_path, monkeypatch):
    """Nothing at opening; a block once while it stays in memory, and no other group's."""
    rows = [row(images=[{"bytes": png_bytes(n), "path": None}]) for n in range(11)]
    path = write(tmp_path, rows, row_group_size=4)
    monkeypatch.setattr(parquet, "ROWS_PER_BATCH", 2)
    reads = []
    original = parquet.ParquetRecords.read_block
    monkeypatch.setattr(
        parquet.ParquetRecords, "read_block", lambda file, g, b, c: reads.append((g, b)) or original(file, g, b, c)
    )
    tasks = read_tasks(path, require_teacher=True)
    assert reads == []
    order = np.random.default_rng(3).permutation(11).tolist()
    assert [tasks[n].images[0].getpixel((0, 0))[0] for n in order] == order
    assert sorted(reads) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]  # all six fit into memory
    reads.clear()
    tasks = read_tasks(path, require_teacher=True)
    for index in (10, 10, 1, 7, 6, 0):
        tasks[index]
    assert reads == [(2, 1), (0, 0), (1, 1)]


def test_blocks_in_memory_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_BATCH", 1)
    path = write(tmp_path, [row(images=[{"bytes": png_bytes(n), "path": None}]) for n in range(6)])
    file = parquet.ParquetRecords(path)
    size = file.read_block(0, 0, "images").nbytes
    images = parquet.EncodedCells(keep_bytes=int(3.5 * size))
    reads = []
    original = parquet.ParquetRecords.read_block
    monkeypatch.setattr(file, "read_block", lambda g, b, c: reads.append(b) or original(file, g, b, c))
    for index in (0, 1, 2, 0, 3, 1, 0):  # the fourth block drives out the one used longest ago, which is 1
        assert images.cell(file, index, "images")[0]["bytes"] == png_bytes(index)
    assert reads == [0, 1, 2, 3, 1]
    assert parquet.EncodedCells(keep_bytes=0).cell(file, 5, "images")[0]["bytes"] == png_bytes(5)


def test_going_forward_decodes_a_group_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_BATCH", 1)
    path = write(tmp_path, [row(images=[{"bytes": png_bytes(n), "path": None}]) for n in range(8)], row_group_size=6)
    file = parquet.ParquetRecords(path)
    opened = []
    monkeypatch.setattr(file, "_blocks", lambda g, c: opened.append(g) or parquet.ParquetRecords._blocks(file, g, c))
    images = parquet.EncodedCells(keep_bytes=0)
    for index in (0, 1, 2, 5, 6, 7, 6, 3, 4):
        assert images.cell(file, index, "images")[0]["bytes"] == png_bytes(index)
    assert opened == [0, 1, 1, 0]  # forward, the next group, back inside it, back to the first


MEASURE = """
import sys
from pathlib import Path
from prism_fast.data import parquet, parsing, readers
parquet.ROWS_PER_BATCH = 8
parsing.load_image = lambda source, *rest: len(source)
readers.read_tasks(sys.argv[1], require_teacher=False)[0]
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
for path in sys.argv[2:]:
    tasks = readers.read_tasks(path, require_teacher=False)
    assert [tasks[index].images for index in (500, 3, 250, 251)] == [[2**18]] * 4
print(status("VmHWM") - before)
"""


def test_memory_stays_small_on_large_files(tmp_path):
    """128 MiB of images, in many row groups and in a single one: opening and reading at random holds a fraction of it
    (a writer's data page is the unit that cannot be split, 2 MiB here)."""
    noise = np.random.default_rng(5)
    payload = [noise.bytes(2**18) for _ in range(8)]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    small = pa.Table.from_pylist([row()])
    schema = small.schema.set(small.schema.get_field_index("images"), pa.field("images", kind))
    table = pa.Table.from_pylist([row(images=[{"bytes": payload[n % 8], "path": None}]) for n in range(512)], schema)
    paths = [tmp_path / f"{group}.parquet" for group in (8, 512)]
    for path, group in zip(paths, (8, 512), strict=True):
        options = dict(compression="none", use_dictionary=False, write_batch_size=8)
        pq.write_table(table, path, row_group_size=group, **options)
        assert pq.read_metadata(path).num_row_groups == 512 // group and path.stat().st_size > 2**27
    command = [sys.executable, "-c", MEASURE, write(tmp_path, [row()]), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80 * 2**10, f"{done.stdout} KiB"


def test_several_files_keep_their_order(tmp_path):
    paths = [write(tmp_path, [row()] * count, f"{name}.parquet") for name, count in (("b", 2), ("a", 1))]
    tasks = read_tasks(paths, require_teacher=True)
    assert [task.uid for task in tasks] == ["0-b-0", "0-b-1", "1-a-0"]
    named = row(extra_info={"uid": "same"})
    paths = [write(tmp_path, [named], f"{name}.parquet") for name in ("c", "d")]
    with pytest.raises(DataError, match=r"d.parquet, row 0: field 'uid': 'same' is also the uid of .*c.parquet, row 0"):
        read_tasks(tmp_path / "[cd].parquet", require_teacher=True)
    assert [task.uid for task in read_tasks(paths, require_teacher=True)] == ["0-same", "1-same"]  # two data sets
    with pytest.raises(ValueError, match="an empty list"):
        read_tasks([], require_teacher=True)


REWARD = {"ground_truth": "3", "style": "rule"}
BAD_ROWS = {
    "no prompt": (row(prompt=DROP), r"a.parquet: field 'prompt': the column is missing \(the file has: images"),
    "no reward_model": (row(reward_model=DROP, answer=DROP), r"field 'reward_model': the column is missing"),
    "prompt number": (row(prompt=5), r"field 'prompt': the column has type int64, wanted string, or list<struct<role"),
    "prompt of empty parts": (
        row(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
        r"row 0: field 'prompt\[0\].content\[0\].text': is missing \(null\)",
    ),
    "image not in a list": (
        row(images={"bytes": b"x", "path": None}),
        r"field 'images': the column has type struct<.*wanted list<struct<bytes: binary, path: string>>",
    ),
    "images of numbers": (row(images=[1, 2]), r"field 'images': the column has type list<.*int64>"),
    "teacher number": (row(teacher_cot=5), r"field 'teacher_cot': the column has type int64, wanted string"),
    "reward text": (row(reward_model="3"), r"field 'reward_model': the column has type string, wanted struct<ground"),
    "truth number": (row(reward_model={"ground_truth": 3}), r"'reward_model': .* has type struct<ground_truth: int"),
    "extra text": (row(extra_info="{}"), r"field 'extra_info': the column has type string, wanted struct. Convert"),
    "truth null": (
        row(reward_model={**REWARD, "ground_truth": None}),
        r"'reward_model': the column has type struct<ground_truth: null",
    ),
    "empty truth": (
        row(reward_model={**REWARD, "ground_truth": " "}),
        r"a.parquet, row 0: field 'reward_model.ground_truth': is empty",
    ),
    "equivalents of numbers": (
        row(reward_model={**REWARD, "equivalent_answers": [3]}),
        r"row 0: field 'reward_model.equivalent_answers\[0\]': is of type int, wanted a string",
    ),
    "equivalents text": (
        row(reward_model={**REWARD, "equivalent_answers": "3"}),
        r"row 0: field 'reward_model.equivalent_answers': is of type str, wanted a list",
    ),
    "unknown role": (
        row(prompt=[{"role": "bot", "content": "<image>"}]),
        r"row 0: field 'prompt\[0\].role': unknown role 'bot'",
    ),
    "ends with assistant": (
        row(prompt=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]),
        r"row 0: field 'prompt': the prompt ends with a turn of role 'assistant'",
    ),
    "markers": (
        row(prompt=[{"role": "user", "content": "<image><image>"}]),
        r"row 0: field 'prompt': 2 <image> markers for 1 images",
    ),
    "no image": (
        row(images=[{"bytes": None, "path": None}]),
        r"row 0: field 'images\[0\]': has none of bytes, path, image, image_url",
    ),
    "empty bytes": (row(images=[{"bytes": b""}]), r"row 0: field 'images\[0\].bytes': holds no bytes"),
    "image URL": (
        row(images=[{"image_url": "http://a/b.png"}]),
        r"row 0: field 'images\[0\].image_url': is a URL \(http://a/b.png\). Nothing is downloaded here",
    ),
    "missing file": (
        row(images=[{"bytes": None, "path": "no.png"}]),
        r"row 0: field 'images\[0\].path': image file .*no.png does not exist",
    ),
    "videos": (row(videos=["a.mp4"]), r"row 0: field 'videos': videos are not supported"),
    "kind number": (row(extra_info={"kind": 3}), r"row 0: field 'extra_info.kind': is of type int"),
    "empty source": (row(data_source=""), r"row 0: field 'data_source': is empty"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_place_and_field(tmp_path, name):
    value, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=message) as caught:
        read_tasks(write(tmp_path, [value]), require_teacher=False)
    assert str(caught.value).startswith(str(tmp_path / "a.parquet"))


def test_null_cells_are_refused(tmp_path):
    for column in ("prompt", "data_source", "reward_model"):
        path = write(tmp_path, [row(), row(**{column: None})], f"{column}.parquet")
        with pytest.raises(DataError, match=rf"{column}.parquet, row 1: field '{column}': is missing \(null\)"):
            read_tasks(path, require_teacher=False)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"no.parquet: the file does not exist"):
        read_tasks(tmp_path / "no.parquet", require_teacher=False)
    (tmp_path / "text.parquet").write_text("hello, this is no parquet file")
    with pytest.raises(DataError, match=r"text.parquet: is not a parquet file"):
        read_tasks(tmp_path / "text.parquet", require_teacher=False)
    path = write(tmp_path, [row() for _ in range(4)], use_dictionary=False, compression="none")
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # pages gone, footer intact
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet, row 0 or later: cannot be read \(.*The file is damaged"):
        read_tasks(path, require_teacher=False)
    empty = pa.Table.from_pylist([row()]).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty.parquet: holds no rows"):
        read_tasks(tmp_path / "empty.parquet", require_teacher=False)


def test_file_that_vanishes_between_opening_and_indexing(tmp_path):
    path = write(tmp_path, [row()])
    tasks = read_tasks(path, require_teacher=False)
    path.unlink()
    with pytest.raises(DataError, match=r"row group 0: field 'images': cannot be read any more"):
        tasks[0]


def test_undecodable_and_too_large_images_are_found_when_indexed(tmp_path):
    path = write(tmp_path, [row(images=[{"bytes": b"GARBAGE", "path": None}]), row()])
    tasks = read_tasks(path, require_teacher=False, max_image_pixels=19)
    with pytest.raises(DataError, match=r"a.parquet, row 0: field 'images\[0\]': 7 inline bytes: not an image"):
        tasks[0]
    with pytest.raises(DataError, match=r"a.parquet, row 1: field 'images\[0\]': .*5 x 4 = 20 pixels, the limit is 19"):
        tasks[1]


def test_problems_are_collected(tmp_path):
    problems: list[DataError] = []
    path = write(tmp_path, [row(data_source=""), row(), row(reward_model={**REWARD, "ground_truth": ""})])
    tasks = read_tasks(path, require_teacher=True, problems=problems)
    assert [task.uid for task in tasks] == ["a-1"]
    assert [str(problem).split(": ")[0].split(", ")[-1] for problem in problems] == ["row 0", "row 2"]
