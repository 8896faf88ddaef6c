from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import IMAGE_PAD, VISION_END, VISION_START, VISION_TOKENS

MESSAGES = [
    {"role": "system", "content": "Read the digits."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]},
]


@pytest.fixture
def strip(rng) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (32, 128), dtype=np.uint8))


def test_a_strip_of_128_by_32_is_not_rescaled_and_takes_four_tokens(processor, strip):
    encoded = processor.encode_prompt(MESSAGES, [strip])
    assert encoded.input_ids.count(processor.image_token_id) == 4
    assert encoded.image_grid_thw.tolist() == [[1, 2, 8]]
    assert encoded.pixel_values.dtype == torch.float32
    # Undo the patch order: (row block, column block, row, column, channel, time, y, x).
    patches = encoded.pixel_values.view(1, 4, 2, 2, 3, 2, 16, 16)
    image = patches.permute(4, 5, 0, 2, 6, 1, 3, 7).reshape(3, 2, 32, 128)
    expected = torch.from_numpy(np.array(strip)).float() / 127.5 - 1
    torch.testing.assert_close(image, expected.expand(3, 2, 32, 128), rtol=0, atol=1e-6)


def test_prompt_is_the_rendered_template_with_expanded_images_and_ends_with_the_generation_prompt(
    processor, strip, rng
):
    square = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    two = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]}
    encoded = processor.encode_prompt([MESSAGES[0], two], [square, strip])
    text = processor.tokenizer.decode(encoded.input_ids)
    images = [f"{VISION_START}{IMAGE_PAD * 4}{VISION_END}"] * 2  # 64x64 and 128x32 both give four merged patches
    assert text == (
        f"<|im_start|>system\nRead the digits.<|im_end|>\n<|im_start|>user\n{images[0]} and {images[1]}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoded.image_grid_thw.tolist() == [[1, 4, 4], [1, 2, 8]]
    assert encoded.pixel_values.shape == (32, 3 * 2 * 16 * 16)
    assert encoded.input_ids == tuple(processor.encode_text(text))


def test_text_only_prompt_has_no_image_tensors(processor):
    encoded = processor.encode_prompt([MESSAGES[0]], [])
    assert encoded.pixel_values is None
    assert encoded.image_grid_thw is None


@pytest.mark.parametrize(
    ("messages", "count"),
    [
        (MESSAGES, 0),
        (MESSAGES, 2),
        ([{"role": "user", "content": f"a literal {IMAGE_PAD}"}], 0),
        ([{"role": "user", "content": "no slot"}], 1),
    ],
)
def test_images_and_placeholders_must_agree(processor, strip, messages, count):
    with pytest.raises(ValueError, match=f"placeholder.*{count} image"):
        processor.encode_prompt(messages, [strip] * count)


def test_empty_messages_are_refused(processor):
    with pytest.raises(ValueError, match="at least one turn"):
        processor.encode_prompt([], [])


def test_reload_gives_identical_prompts(processor, strip, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    for attribute in ("eos_id", "pad_id", "banned_ids", "image_token_id"):
        assert getattr(loaded, attribute) == getattr(processor, attribute)
    a, b = processor.encode_prompt(MESSAGES, [strip]), loaded.encode_prompt(MESSAGES, [strip])
    assert a.input_ids == b.input_ids
    assert torch.equal(a.pixel_values, b.pixel_values)


def test_area_limits_are_kept_and_can_be_overridden(processor, tmp_path, rng):
    processor.save_pretrained(tmp_path)
    large = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    count = lambda p: p.encode_prompt(MESSAGES, [large]).input_ids.count(p.image_token_id)  # noqa: E731
    assert count(Processor.from_pretrained(tmp_path)) == 64
    assert count(Processor.from_pretrained(tmp_path, max_pixels=128 * 128)) == 16
    assert count(Processor.from_pretrained(tmp_path, min_pixels=512 * 512)) == 256
    with pytest.raises(ValueError, match="min_pixels <= max_pixels"):
        Processor.from_pretrained(tmp_path, min_pixels=10**6, max_pixels=10)


def test_files_have_the_names_and_classes_that_stock_auto_classes_look_for(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert image["image_processor_type"] == "Qwen2VLImageProcessor"
    assert video["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert image["processor_class"] == video["processor_class"] == tokenizer["processor_class"] == "Qwen3VLProcessor"
    assert image["size"] == {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}
    assert (tmp_path / "chat_template.jinja").is_file()


def test_stock_auto_processor_gives_the_same_ids(processor, strip, tmp_path):
    pytest.importorskip("torchvision", reason="stock AutoProcessor of Qwen3-VL needs torchvision")
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image", "image": strip}, {"type": "text", "text": "Sum?"}]}]
    theirs = stock.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ours = processor.encode_prompt(messages, [strip])
    assert tuple(theirs["input_ids"][0].tolist()) == ours.input_ids
    torch.testing.assert_close(theirs["pixel_values"], ours.pixel_values, rtol=0, atol=1e-5)


def test_checkpoint_with_nested_processor_config_and_template_in_json(processor, strip, tmp_path):
    """Newer folders nest the image settings in processor_config.json, older ones keep the template in a JSON file."""
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    loaded = Processor.from_pretrained(tmp_path)
    a, b = processor.encode_prompt(MESSAGES, [strip]), loaded.encode_prompt(MESSAGES, [strip])
    assert a.input_ids == b.input_ids
    assert torch.equal(a.pixel_values, b.pixel_values)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_missing_files_are_named(processor, tmp_path, name):
    processor.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Processor.from_pretrained(tmp_path / "nowhere")


def test_a_foreign_tokenizer_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    foreign = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks <\|image_pad\|>"):
        Processor(foreign, processor.image_processor)


def test_ids_that_rollouts_rely_on(processor):
    vocab = processor.tokenizer.get_vocab()
    assert set(processor.banned_ids) == {vocab[t] for t in VISION_TOKENS}
    assert processor.eos_id not in processor.banned_ids
    assert processor.pad_id not in processor.banned_ids
    ids = processor.encode_text("<think>\n7\n</think>")
    assert processor.decode([*ids, processor.eos_id, processor.pad_id]) == "<think>\n7\n</think>"
