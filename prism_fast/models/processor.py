"""Text and images to model inputs, with only the tokenizer and transformers' PIL image processor.

Stock ``AutoProcessor`` for Qwen3-VL needs torchvision because it also handles videos. Training does not, so this class
reads and writes the same files but handles images alone. Pixels are those of the PIL backend (bicubic in PIL;
torchvision's differ in the third digit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_fast.models.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, VISION_TOKENS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

#: Mean and standard deviation of every channel in Qwen3-VL's published preprocessing.
_QWEN3_VL_MEAN = (0.5, 0.5, 0.5)
_QWEN3_VL_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt as input of the models; made once, read by rollout engine and trainer.

    ``input_ids``: token ids, image placeholders already expanded to one id per merged patch, ending with the
    generation prompt. ``pixel_values`` ``[patches, C·T·p·p]`` float32 and ``image_grid_thw`` ``[images, 3]`` int64
    (patches along time, height, width): ``None`` for a prompt without images. ``images``: the originals of the pixels,
    for engines that preprocess images themselves.
    """

    input_ids: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    images: tuple[Image, ...] = ()


class Processor:
    """Tokenizer and PIL image processor of a Qwen3-VL model; encoding changes no state.

    Attributes: ``tokenizer``, ``image_processor``, ``eos_id`` (``<|im_end|>``), ``pad_id`` (``<|endoftext|>``),
    ``image_token_id``, ``banned_ids`` (vision tokens: a sampled one would ask for an image that does not exist, so
    every rollout engine must give them probability zero).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil) -> None:
        vocab = tokenizer.get_vocab()
        missing = [token for token in (IM_START, IM_END, END_OF_TEXT, *VISION_TOKENS) if token not in vocab]
        if missing:
            raise ValueError(f"the tokenizer is not a Qwen3-VL one: it lacks {', '.join(missing)}")
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: add chat_template.jinja to the checkpoint folder")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.eos_id: int = vocab[IM_END]
        self.pad_id: int = vocab[END_OF_TEXT]
        self.image_token_id: int = vocab[IMAGE_PAD]
        self.banned_ids: tuple[int, ...] = tuple(sorted(vocab[token] for token in VISION_TOKENS))

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        patch_size: int = 16,
        merge_size: int = 2,
        min_pixels: int = 32 * 32,
        max_pixels: int = 512 * 512,
    ) -> Processor:
        """A processor for a locally built model. An image whose sides are multiples of ``patch_size·merge_size``
        and whose area lies within ``[min_pixels, max_pixels]`` is not rescaled: 128×32 pixels give exactly 4 image
        tokens."""
        image_processor = Qwen2VLImageProcessorPil(
            size=_area_limits(min_pixels, max_pixels),
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=2,
            image_mean=list(_QWEN3_VL_MEAN),
            image_std=list(_QWEN3_VL_STD),
        )
        return cls(tokenizer, image_processor)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Read a folder written by :meth:`save_pretrained` or any Qwen3-VL checkpoint folder (never the network).

        ``min_pixels`` / ``max_pixels`` override the image area limits of the checkpoint (in pixels).

        Raises:
            FileNotFoundError: the folder or one of the files that are needed is missing.
            ValueError: the tokenizer is not a Qwen3-VL one.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"processor folder {folder} does not exist")
        if not (folder / "tokenizer_config.json").is_file():
            raise FileNotFoundError(f"{folder / 'tokenizer_config.json'} is missing: copy the tokenizer files there")
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise FileNotFoundError(f"{folder / 'preprocessor_config.json'} is missing: copy the image settings there")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
            # Older checkpoints have the template in a file of its own, which only a full processor reads.
            tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        processor = cls(tokenizer, image_processor)
        processor.limit_images(min_pixels, max_pixels)
        return processor

    def limit_images(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Replace the limits of the image area, in pixels; None: as it is. Images outside are resized into them.

        Raises:
            ValueError: the smaller limit is above the larger one.
        """
        low, high = self.image_area
        self.image_processor.size = _area_limits(
            low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
        )

    @property
    def image_area(self) -> tuple[int, int]:
        """Pixels of the smallest and the largest image that is not resized (except to whole patches)."""
        size = self.image_processor.size
        return int(size["shortest_edge"]), int(size["longest_edge"])

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer, chat template, image and video settings. Stock ``AutoProcessor`` loads the folder as a
        ``Qwen3VLProcessor`` where torchvision exists; only it needs the video file."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text())
        config["processor_class"] = "Qwen3VLProcessor"
        _write_json(config_file, config)

        ip = self.image_processor
        shared = {
            "do_convert_rgb": True,
            "do_normalize": ip.do_normalize,
            "do_rescale": ip.do_rescale,
            "do_resize": ip.do_resize,
            "image_mean": list(ip.image_mean),
            "image_std": list(ip.image_std),
            "merge_size": ip.merge_size,
            "patch_size": ip.patch_size,
            "processor_class": "Qwen3VLProcessor",
            "resample": int(ip.resample),
            "rescale_factor": ip.rescale_factor,
            "size": {key: int(ip.size[key]) for key in ("shortest_edge", "longest_edge")},
            "temporal_patch_size": ip.temporal_patch_size,
        }
        # Every version of transformers resolves the name without a suffix to the backend that it has.
        _write_json(folder / "preprocessor_config.json", {**shared, "image_processor_type": "Qwen2VLImageProcessor"})
        _write_json(
            folder / "video_preprocessor_config.json", {**shared, "video_processor_type": "Qwen3VLVideoProcessor"}
        )

    def encode_prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image], *, generation_prompt: bool = True
    ) -> Prompt:
        """Render ``messages`` with the chat template, expand image placeholders, preprocess ``images``.

        ``messages``: ``{"role": str, "content": str | [{"type": "image"} | {"type": "text", "text": str}, …]}``;
        the k-th image part is ``images[k]``. ``generation_prompt`` appends ``<|im_start|>assistant\\n``.

        Raises:
            ValueError: the number of image placeholders in the rendered text and of ``images`` differ, or no messages.
        """
        ids = self._prompt_ids(messages, len(images), generation_prompt)
        if not images:
            return Prompt(tuple(ids), None, None)
        features = self.image_processor(images=list(images), return_tensors="pt")
        grid: torch.Tensor = features["image_grid_thw"]
        repeats = iter((grid.prod(-1) // self.image_processor.merge_size**2).tolist())
        expanded: list[int] = []
        for token in ids:
            if token == self.image_token_id:
                expanded.extend([token] * next(repeats))
            else:
                expanded.append(token)
        return Prompt(tuple(expanded), features["pixel_values"], grid, tuple(images))

    def prompt_tokens(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image]) -> int:
        """Length of ``encode_prompt(messages, images).input_ids``, computed without reading pixels. Raises like it."""
        tokens = len(self._prompt_ids(messages, len(images), True))
        for image in images:
            patches = self.image_processor.get_number_of_image_patches(image.height, image.width)
            tokens += patches // self.image_processor.merge_size**2 - 1  # in place of the placeholder
        return tokens

    def _prompt_ids(self, messages: Sequence[Mapping[str, Any]], num_images: int, generation_prompt: bool) -> list[int]:
        """Token ids of the rendered chat, one placeholder per image."""
        if not messages:
            raise ValueError("messages is empty: a prompt needs at least one turn")
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
        ids = self.encode_text(text)
        slots = ids.count(self.image_token_id)
        if slots != num_images:
            raise ValueError(
                f"the messages hold {slots} image placeholder(s) but {num_images} image(s) were given: use one "
                f'{{"type": "image"}} part per image and keep the literal {IMAGE_PAD} out of texts'
            )
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ``text``: nothing is added before or after it, special tokens are recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text written by a person or a model: special tokens spelled out in it are plain letters, so
        that no text can open a turn or pose as an image. ``<think>`` and ``</think>`` are not special."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens (``<think>`` and ``</think>`` are not special and stay)."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _area_limits(min_pixels: int, max_pixels: int) -> dict[str, int]:
    """The limits of the image area under the names in Qwen's image processors (areas, although called edges)."""
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"image area limits need 0 < min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    return {"shortest_edge": min_pixels, "longest_edge": max_pixels}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
