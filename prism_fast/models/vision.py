"""Images through the vision tower, and their features into the rows of the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class ImageFeatures(NamedTuple):
    """``features`` ``[M, H]`` for the image tokens and ``levels``: one ``[M, H]`` per DeepStack layer."""

    features: Tensor
    levels: tuple[Tensor, ...]

    def take(self, index: Tensor) -> ImageFeatures:
        """The rows ``index`` ``[M']`` int64 of features and levels."""
        return ImageFeatures(self.features[index], tuple(level[index] for level in self.levels))


def encode_images(backbone: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor) -> ImageFeatures:
    """One pass of the vision tower over all images, in order of appearance.

    ``backbone``: ``Qwen3VLModel`` or ``Qwen3VLMoeModel``; ``pixel_values`` ``[patches, C·T·p·p]``, ``image_grid_thw``
    ``[images, 3]`` int64.
    """
    # The frame lengths are passed to the attention of every layer, so that none has to read them from the device.
    lengths = tuple(h * w for t, h, w in image_grid_thw.tolist() for _ in range(t))
    encoded = backbone.get_image_features(pixel_values, image_grid_thw, return_dict=True, frame_lengths=lengths)
    return ImageFeatures(torch.cat(tuple(encoded.pooler_output)), tuple(encoded.deepstack_features))


def place_images(embeds: Tensor, images: ImageFeatures, slot: Tensor) -> tuple[Tensor, dict[str, object]]:
    """Put image features at the flat positions ``slot`` ``[M]`` (ascending) of token embeddings ``[B, S, H]``.

    Returns:
        The embeddings, and the arguments by which the language model adds the DeepStack levels at the same places.
    """
    rows, width, hidden = embeds.shape
    flat = embeds.reshape(rows * width, hidden).index_copy(0, slot, images.features.to(embeds.dtype))
    at_image = torch.zeros(rows * width, dtype=torch.bool, device=embeds.device)
    at_image[slot] = True
    return flat.view(rows, width, hidden), {
        "visual_pos_masks": at_image.view(rows, width),
        "deepstack_visual_embeds": list(images.levels),
    }
