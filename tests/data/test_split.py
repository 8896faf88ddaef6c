"""The validation set that is cut off demonstrations, and the fingerprint of data."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.data.problems import DataError, Place
from prism_fast.data.readers import read_sharegpt
from prism_fast.data.samples import Row, Samples
from prism_fast.data.split import split_samples
from prism_fast.data.writers import encode_png

REPLY = {"role": "assistant", "content": "y"}


def sharing(*shares: tuple[str, ...]) -> Samples:
    rows = [Row(Place(Path("a.json"), f"row {n}"), lambda _, n=n: n, b"", names) for n, names in enumerate(shares)]
    return Samples(rows)


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_cut_off_and_no_image_is_on_both_sides(seed):
    names = [(f"{n % 40}",) for n in range(200)]
    training, validation = split_samples(sharing(*names), 0.1, seed)
    assert sorted([*training, *validation]) == list(range(200)) and len(validation) == 20
    assert not {n % 40 for n in training} & {n % 40 for n in validation}
    again = split_samples(sharing(*names), 0.1, seed)[1]
    assert list(again) == list(validation) == sorted(validation)


def test_images_link_rows_over_others():
    chained = sharing(*[(str(n), str(n + 1)) for n in range(9)], ("x",))
    training, validation = split_samples(chained, 0.5, 1)
    assert list(validation) == [9] and list(training) == list(range(9))


def test_a_share_below_every_group_takes_the_smallest():
    training, validation = split_samples(sharing(*[("a",)] * 5, *[("b",)] * 3), 0.05, 1)
    assert list(validation) == [5, 6, 7] and len(training) == 5


@pytest.mark.parametrize("samples", [sharing(("a",)), sharing(("a",), ("a", "b"), ("b",))])
def test_samples_that_hang_together_are_refused(samples):
    with pytest.raises(DataError, match=r"a.json: no validation set can be cut off.*Give one: data.sft_val=PATH"):
        split_samples(samples, 0.1, 1)


def test_what_rows_share(tmp_path):
    """The path of an image, the bytes of one in a table, or the prompt of a row without images."""
    for n in range(2):
        Image.new("L", (2, 2), n).save(tmp_path / f"{n}.png")
    turns = [{"role": "user", "content": "<image>x"}, REPLY]
    plain = [{"role": "user", "content": "x"}, REPLY]
    records = [{"messages": turns, "image": name} for name in ("0.png", "1.png", str(tmp_path / "0.png"))]
    records += [{"messages": plain}, {"messages": [plain[0], {**REPLY, "content": "z"}]}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    found = read_sharegpt(tmp_path / "a.json")
    names = [found.shares(n) for n in range(5)]
    assert names[0] == names[2] != names[1] and names[3] == names[4]
    images = [[{"bytes": encode_png(Image.new("L", (2, 2), shade))}] for shade in (0, 1, 0)]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "images": i} for i in images]), tmp_path / "a.parquet")
    found = read_sharegpt(tmp_path / "a.parquet")
    assert found.shares(0) == found.shares(2) != found.shares(1)


def test_the_fingerprint_is_of_rows_and_their_order(tmp_path):
    turns = [{"role": "user", "content": "<image>x"}, REPLY]
    shades = [[{"bytes": encode_png(Image.new("L", (2, 2), shade))}] for shade in range(3)]

    def written(order, name="a.parquet", reply="y") -> str:
        said = [turns[0], {**REPLY, "content": reply}]
        pq.write_table(pa.Table.from_pylist([{"messages": said, "images": shades[n]} for n in order]), tmp_path / name)
        return read_sharegpt(tmp_path / name).fingerprint()

    first = written([0, 1, 2])
    assert written([0, 1, 2]) == written([0, 1, 2], "b.parquet") == first
    others = {written([1, 0, 2]), written([0, 1]), written([0, 1, 1]), written([0, 1, 2], reply="z")}
    assert len(others | {first}) == 5
