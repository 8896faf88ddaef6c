from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_sharegpt

USER = {"role": "user", "content": "<image>What is it?"}
REPLY = {"role": "assistant", "content": "A cat."}


def png(path: Path, size=(5, 4), mode="RGB", **options) -> Path:
    Image.new(mode, size, 7).save(path, **options)
    return path


def write(folder: Path, content: object) -> Path:
    path = folder / "sft.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def record(*, messages=None, images=("cat.png",), **more) -> dict:
    return {"messages": [USER, REPLY] if messages is None else messages, "images": list(images), **more}


def test_both_forms_read_alike(tmp_path):
    png(tmp_path / "cat.png")
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hello\n<image>"},
        {"from": "gpt", "value": "Hi"},
        {"from": "human", "value": "<image> and what is that? "},
        {"from": "gpt", "value": "A cat."},
    ]
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    other = [{"role": names[turn["from"]], "content": turn["value"]} for turn in turns]
    images = ["cat.png", str(tmp_path / "cat.png")]
    path = write(tmp_path, [{"conversations": turns, "images": images}, {"messages": other, "images": images, "id": 9}])
    first, second = read_sharegpt(path)
    assert first.messages == second.messages
    assert first.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello\n"}, {"type": "image"}]},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " and what is that? "}]},
    ]
    assert (first.uid, second.uid) == ("sft-0", "9")
    assert first.response == second.response == "A cat."
    assert [image.size for image in first.images] == [(5, 4), (5, 4)]
    assert all(image.mode == "RGB" for image in first.images)


def test_text_only_system_column_and_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, REPLY], "system": "S", "images": None},
        {"messages": [{"role": "user", "content": "Ho"}, REPLY]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8-sig")
    first, second = read_sharegpt(path)
    assert first.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert second.messages == [{"role": "user", "content": "Ho"}]
    assert (first.uid, second.uid, first.images) == ("a-1", "a-3", [])


def test_images_are_decoded_when_indexed_only(tmp_path):
    png(tmp_path / "cat.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    samples = read_sharegpt(write(tmp_path, [record(), record(images=["bad.png"])]))
    assert len(samples) == 2
    assert samples[0].images[0].size == (5, 4)
    assert samples[-2].uid == "sft-0"
    assert [sample.uid for sample in samples[:1]] == ["sft-0"]
    with pytest.raises(DataError, match=r"sft\.json, row 1: field 'images\[0\]': .*bad\.png: not an image"):
        samples[1]
    with pytest.raises(IndexError):
        samples[2]


BAD_RECORDS = {
    "not an object": (["text"], r"row 0: is of type str, wanted an object"),
    "both forms": ([{**record(), "conversations": []}], r"row 0: wanted one of .* found conversations and messages"),
    "no form": ([{"text": "x"}], r"row 0: wanted one of .* neither \(it has: text\)"),
    "turns no list": ([record(messages={"role": "user"})], r"field 'messages': is of type dict, wanted a list"),
    "turn no object": ([record(messages=["hi"])], r"field 'messages\[0\]': is of type str, wanted an object"),
    "turn without content": ([record(messages=[{"role": "user"}])], r"\[0\]': has no 'content' \(it has: role\)"),
    "unknown role": (
        [record(messages=[{"role": "tool", "content": "x"}, REPLY])],
        r"'messages\[0\].role': unknown role 'tool'. Known roles: system, user, human",
    ),
    "content of parts": (
        [record(messages=[{"role": "user", "content": [{"type": "audio", "audio": "x"}]}, REPLY])],
        r"'messages\[0\].content\[0\].type': unknown type of part 'audio'. Known types: text, image",
    ),
    "content number": (
        [record(messages=[{"role": "user", "content": 3}, REPLY])],
        r"'messages\[0\].content': is of type int, wanted a string",
    ),
    "late system turn": (
        [record(messages=[USER, {"role": "system", "content": "x"}, REPLY])],
        r"'messages\[1\].role': a system turn after the first turn. Move it to the front",
    ),
    "no response": ([record(messages=[USER])], r"field 'messages': the last turn is not the assistant's"),
    "no turns": ([record(messages=[])], r"field 'messages': the last turn is not the assistant's"),
    "empty response": (
        [record(messages=[USER, {"role": "assistant", "content": " \n"}])],
        r"'messages\[1\]': is empty. Fill it in",
    ),
    "no user turn": ([record(messages=[REPLY], images=[])], r"'messages': the prompt is empty"),
    "two replies": ([record(messages=[USER, REPLY, REPLY])], r"the prompt ends with a turn of role 'assistant'"),
    "too few markers": (
        [record(messages=[{"role": "user", "content": "x"}, REPLY])],
        r"'messages': 0 <image> markers for 1 images. Write one <image> marker",
    ),
    "too many markers": ([record(images=[])], r"'messages': 1 <image> markers for 0 images"),
    "marker in system turn": (
        [record(messages=[{"role": "system", "content": "<image>"}, USER, REPLY])],
        r"'messages\[0\]': an <image> marker in a turn of role 'system'",
    ),
    "video marker": (
        [record(messages=[{"role": "user", "content": "<video>"}, REPLY], images=[])],
        r"'messages\[0\]': holds a <video> marker. Videos are not supported",
    ),
    "videos": ([record(videos=["a.mp4"])], r"field 'videos': videos are not supported"),
    "system twice": (
        [record(messages=[{"role": "system", "content": "x"}, USER, REPLY], system="y")],
        r"field 'system': is given here and as the first turn",
    ),
    "system number": ([record(system=5)], r"field 'system': is of type int"),
    "missing image": ([record(images=["dog.png"])], r"'images\[0\]': image file .*dog.png does not exist"),
    "URL": ([record(images=["https://a.b/c.png"])], r"\[0\]': is a URL \(https://a.b/c.png\). Nothing is"),
    "data URL": ([record(images=["data:image/png;base64,AAAA"])], r"'images\[0\]': is a URL \(data:image"),
    "images text": ([{**record(), "images": "cat.png"}], r"field 'images': is of type str, wanted a list"),
    "image number": ([record(images=[4])], r"'images\[0\]': is of type int, wanted a string"),
    "image object": ([record(images=[{"url": "x"}])], r"\[0\]': has none of bytes, path, image, .*\(it has: url"),
    "same id": ([record(id="a"), record(id="a")], r"row 1: field 'uid': 'a' is also the uid of .*sft.json, row 0"),
    "bad id": ([record(id=[1])], r"field 'uid': is of type list"),
    "base64": ([record(images=["iVBORw0KGgo" * 40])], r"\[0\]': is base64 text \(iVBOR.*…\). Decode it"),
    "control token": (
        [record(messages=[{"role": "user", "content": "<image><|image_pad|>"}, REPLY])],
        r"'messages\[0\].content': holds the control token <\|image_pad\|>. Remove it",
    ),
    "control token in the response": (
        [record(messages=[USER, {"role": "assistant", "content": "a<|im_end|>"}])],
        r"'messages\[1\].content': holds the control token <\|im_end\|>",
    ),
    "half a character": (
        '[{"messages": [{"role": "user", "content": "\\ud83d"}]}]',
        r"'messages\[0\].content': is not valid Unicode \(surrogates not allowed\)",
    ),
    "deep nesting": ("[" * 200_000, r"sft.json: is nested too deeply"),
    "no rows": ([], r"sft.json: holds no rows"),
    "no list": ({"data": []}, r"sft.json: is of type dict, wanted a list"),
    "bad JSON": ('[\n{"messages": [}\n]', r"sft.json, line 2, column 15: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_refused_by_place_and_field(tmp_path, name):
    content, message = BAD_RECORDS[name]
    png(tmp_path / "cat.png")
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_sharegpt(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(".")


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"none.json: the file does not exist. Check the path"):
        read_sharegpt(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json: is not UTF-8 text.*Save it as UTF-8"):
        read_sharegpt(tmp_path / "latin.json")
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(record(messages=[{"role": "user", "content": "x"}, REPLY], images=[])) + "\n{oops\n")
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not valid JSON \(Expecting property name"):
        read_sharegpt(lines)


def test_problems_are_collected_and_their_rows_left_out(tmp_path):
    png(tmp_path / "cat.png")
    path = write(tmp_path, [record(), record(images=["dog.png"]), record(id="x"), record(id="x"), 5])
    problems: list[DataError] = []
    samples = read_sharegpt(path, problems=problems)
    assert [sample.uid for sample in samples] == ["sft-0", "x"]
    assert [str(problem).split(":")[0].split(", ")[-1] for problem in problems] == ["row 1", "row 3", "row 4"]


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be an enormous image."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "bomb.png").write_bytes(huge_png(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(huge_png(9_000, 9_000))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    frames = [Image.new("L", (4, 4), value) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((3, 3), 40_000, dtype=np.int32)).save(tmp_path / "deep.tiff")
    expected = {
        "half.png": r"cannot be decoded \(.*The file is damaged: save it again",
        "bomb.png": r"more pixels than Pillow opens",
        "large.png": r"9000 x 9000 = 81000000 pixels, the limit is 67108864. Resize .* or raise max_image_pixels",
        "empty.png": r"not an image that can be read. Known formats: PNG, JPEG",
        "page.eps": r"not an image that can be read",
        "moving.gif": r"has 2 frames. Save the one frame",
        "deep.tiff": r"pixel mode I does not say which value is white",
    }
    samples = read_sharegpt(write(tmp_path, [record(images=[name]) for name in expected]))
    for index, (name, message) in enumerate(expected.items()):
        with pytest.raises(DataError, match=rf"row {index}: field 'images\[0\]': .*{name}: {message}"):
            samples[index]
    small = read_sharegpt(write(tmp_path, [record(images=["whole.png"])]), max_image_pixels=1599)
    with pytest.raises(DataError, match=r"40 x 40 = 1600 pixels, the limit is 1599"):
        small[0]


def test_transparency_becomes_white_and_exif_turns(tmp_path):
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    turned = Image.new("RGB", (6, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    names = ["clear.png", "turned.jpg", "grey.png"]
    first, second, third = (s.images[0] for s in read_sharegpt(write(tmp_path, [record(images=[n]) for n in names])))
    assert [first.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    assert second.size == (2, 6)
    np.testing.assert_array_equal(np.asarray(third), np.repeat(grey[..., None], 3, axis=2))


def test_image_root(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    png(tmp_path / "elsewhere" / "cat.png")
    samples = read_sharegpt(write(tmp_path, [record()]), image_root=tmp_path / "elsewhere")
    assert samples[0].images[0].size == (5, 4)
