"""Strips of real handwritten digits: scikit-learn's bundled optical digits, cut into disjoint pools and tiled.

The 1,797 images (8 x 8 pixels, 17 grey levels; E. Alpaydin and C. Kaynak, UCI repository) come with the package,
nothing is downloaded. An image belongs to one pool only, so no pixel of a test digit is ever seen in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGITS_PER_STRIP = 3
TILE = 32
"""Pixels per digit: one vision token of a Qwen3-VL processor (patches of 16, merged 2 x 2)."""


@dataclass(frozen=True)
class Strip:
    """One image: the digits in reading order and where they come from (indices into the deduplicated collection)."""

    digits: tuple[int, ...]
    sources: tuple[int, ...]
    image: Image.Image


class DigitCollection:
    """Distinct 8 x 8 digits (exact duplicates dropped) with labels, upscaled to tiles."""

    def __init__(self) -> None:
        bundled = load_digits()
        pixels = bundled.images.astype(np.uint8)
        _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
        first.sort()
        self.labels: list[int] = bundled.target[first].tolist()
        grey = np.rint(pixels[first] * (255 / 16)).astype(np.uint8)
        self.tiles = [Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BICUBIC) for tile in grey]

    def __len__(self) -> int:
        return len(self.labels)

    def strip(self, sources: Sequence[int]) -> Strip:
        """Tile the digits ``sources`` from left to right into one greyscale image."""
        image = Image.new("L", (TILE * len(sources), TILE))
        for place, source in enumerate(sources):
            image.paste(self.tiles[source], (TILE * place, 0))
        return Strip(tuple(self.labels[source] for source in sources), tuple(sources), image)

    def strips(self, pool: np.ndarray, count: int, rng: np.random.Generator) -> list[Strip]:
        """``count`` strips that use the digits of ``pool`` equally often: pass after pass through it, reshuffled.

        ``count * DIGITS_PER_STRIP <= len(pool)`` uses each digit at most once.
        """
        if len(pool) < DIGITS_PER_STRIP:
            raise ValueError(f"a pool of {len(pool)} digits cannot fill a strip of {DIGITS_PER_STRIP}")
        whole = len(pool) - len(pool) % DIGITS_PER_STRIP
        made: list[Strip] = []
        while len(made) < count:
            order = rng.permutation(pool)[:whole].reshape(-1, DIGITS_PER_STRIP)
            made += [self.strip(sources) for sources in order[: count - len(made)].tolist()]
        return made


def split_pools(size: int, train: int, test: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Disjoint index pools (train, validation, test); validation gets what is left, at least one strip."""
    if train < DIGITS_PER_STRIP or test < DIGITS_PER_STRIP or size - train - test < DIGITS_PER_STRIP:
        raise ValueError(
            f"{train} train and {test} test digits leave {size - train - test} of {size} for validation: "
            f"each part needs at least {DIGITS_PER_STRIP}"
        )
    order = rng.permutation(size)
    return order[:train], order[train : size - test], order[size - test :]
