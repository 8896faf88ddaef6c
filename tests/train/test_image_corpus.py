"""Images as people have them: ``data check`` and a stage's own encoding give the same verdict on each."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from prism_fast.data.check import check_file
from prism_fast.data.parsing import Settings
from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_sharegpt
from prism_fast.models.packing import PromptGroup
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.train.sft import encode

TURNS = [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "Three."}]
GREY16 = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (64, 48), (9, 90, 200)), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [Image.new("RGB", (64, 48), (90 * n, 9, 9)) for n in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def plain(mode: str, size=(64, 48)) -> Image.Image:
    return Image.new(mode, size)


# Name: (bytes of the file, merged patches of 32 x 32 pixels, or the words of the refusal).
CORPUS = {
    "turned by EXIF": (turned(), 2 * 2),
    "palette": (saved(plain("P")), 2 * 2),
    "16-bit grey": (saved(Image.fromarray(GREY16)), 2 * 2),
    "CMYK": (saved(plain("CMYK"), "JPEG"), 2 * 2),
    "alpha": (saved(plain("RGBA")), 2 * 2),
    "one bit": (saved(plain("1")), 2 * 2),
    "WebP": (saved(plain("RGB"), "WEBP"), 2 * 2),
    "1 x 1": (saved(plain("L", (1, 1))), 1),
    "800 x 4": (saved(plain("L", (800, 4))), 15),  # 480 x 32 pixels: enlarged until no side is below a patch
    "12 megapixels": (saved(plain("L", (4000, 3000)), "JPEG"), 18 * 13),  # 576 x 416 pixels, at most 512²
    "900 x 4": (saved(plain("L", (900, 4))), "more than 200 times"),
    "animated": (animated(), "3 frames"),
    "truncated": (saved(Image.fromarray(GREY16))[:-200], "cannot be decoded"),
    "empty file": (b"", "not an image that can be read"),
    "a page": (b"<html>not found</html>", "not an image that can be read"),
    "32-bit grey": (saved(plain("I"), "TIFF"), "does not say which value is white"),
    "20 megapixels": (saved(plain("1", (5000, 4000))), "20000000 pixels, the limit is 16777216"),
}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.build(train_tokenizer(["How many? Three."] * 3, 400))


@pytest.mark.parametrize("name", CORPUS)
def test_check_and_training_agree(name, processor, tmp_path):
    content, expected = CORPUS[name]
    (tmp_path / "image").write_bytes(content)
    path = tmp_path / "demos.json"
    path.write_text(json.dumps([{"messages": TURNS, "images": ["image"]}]))
    found = [
        check_file(path, settings=Settings(max_image_pixels=2**24), processor=known) for known in (None, processor)
    ]
    try:
        (group,) = encode([read_sharegpt(path, max_image_pixels=2**24)[0]], processor)
    except DataError as error:
        assert isinstance(expected, str) and expected in str(error)
        assert [[str(problem) for problem in finding.problems] for finding in found] == [[str(error)]] * 2
    else:
        assert isinstance(group, PromptGroup)
        assert group.prompt.input_ids.count(processor.image_token_id) == expected
        assert [(finding.samples, finding.problems) for finding in found] == [(1, [])] * 2
        assert found[1].prompt_tokens == [len(group.prompt.input_ids)]
