"""Cuts a validation set off demonstrations: rows that show the same image stay on one side."""

from __future__ import annotations

import numpy as np

from prism_fast.data.problems import Place
from prism_fast.data.samples import Samples, T


def split_samples(samples: Samples[T], share: float, seed: int) -> tuple[Samples[T], Samples[T]]:
    """(the rest, about ``share`` of the samples), each in file order and neither empty.

    Samples with a common image (the same bytes, or the same path) are never divided, and neither are rows without
    images that have the same prompt. Which ones are cut off is drawn from ``seed``.

    Raises:
        DataError: all samples hang together.
    """
    groups = _connected(samples)
    target = max(1, round(share * len(samples)))
    cut: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if len(cut) + len(groups[number]) <= target:
            cut += groups[number]
    if not cut and len(groups) > 1:
        cut = list(min(groups, key=len))  # every group is larger than the share
    if not cut or len(cut) == len(samples):
        wrong = f"no validation set can be cut off: its {len(samples)} usable samples show the same image or prompt"
        raise Place(samples.place(0).file).error("", wrong, "Give one: data.sft_val=PATH")
    chosen = set(cut)
    rest = [index for index in range(len(samples)) if index not in chosen]
    return samples.take(rest), samples.take(sorted(chosen))


def _connected(samples: Samples) -> list[list[int]]:
    """Groups of samples that are linked by common images, in order of their first one."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index in range(len(samples)):
        for name in samples.shares(index):
            low, high = sorted((root(first.setdefault(name, index)), root(index)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for index in range(len(samples)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
