"""Samples of the readers and writers: a demonstration, a task, a pair.

``messages`` are chat turns ``{"role": "system"|"user"|"assistant", "content": str | [part, …]}``. The content of a turn
with images is a list of parts ``{"type": "image"}`` and ``{"type": "text", "text": str}``; the n-th image part is
``images[n]``. ``images`` are RGB Pillow images of any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, overload

from PIL.Image import Image

from prism_fast.data.problems import Place

MAX_TRUTH_CHARS = 4096
"""Longest ground truth or equivalent answer: comparing answers takes more than linear time."""


@dataclass(frozen=True)
class Demonstration:
    """One SFT example: the prompt turns (``messages``, without the last assistant turn) and that turn's text."""

    uid: str
    messages: list[dict[str, Any]]
    response: str
    images: list[Image]


@dataclass(frozen=True)
class Task:
    """One question with a verifiable answer, and a teacher's response to it (alignment, RLVR, eval).

    ``teacher_caption`` and ``teacher_cot`` keep their tags. ``kind`` groups questions for reports; items of one
    ``cluster`` share an image (their errors are not independent). ``extra``: all other fields of the file.
    """

    uid: str
    messages: list[dict[str, Any]]
    images: list[Image]
    data_source: str
    ground_truth: str
    equivalent_answers: tuple[str, ...] = ()
    question: str = ""
    teacher_caption: str | None = None
    teacher_cot: str | None = None
    teacher_response: str | None = None
    kind: str | None = None
    cluster: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One discriminator warm-up example: the teacher's and the student's texts for one prompt, as caption and reasoning
    spans, as whole responses, or both (an absent form is ``None`` on both sides)."""

    uid: str
    messages: list[dict[str, Any]]
    images: list[Image]
    teacher_caption: str | None = None
    student_caption: str | None = None
    teacher_cot: str | None = None
    student_cot: str | None = None
    teacher_response: str | None = None
    student_response: str | None = None


T = TypeVar("T", Demonstration, Task, Pair)


class Row(NamedTuple, Generic[T]):
    """A parsed row. ``build``: of whether to decode the images, the sample. ``digest``: of the row as the file has it.
    ``shares``, of demonstrations: names of its images, or of its prompt where it has none; rows with a common one
    belong together. ``entry``: number of its data set."""

    place: Place
    build: Callable[[bool], T]
    digest: bytes
    shares: tuple[str, ...] = ()
    entry: int = 0


class Samples(Sequence[T], Generic[T]):
    """Samples of one or several data sets; indexing one decodes its images (DataError if they cannot be).

    ``weights``: by data set, the share of draws that a training stage takes from it; None: every sample once per epoch.
    """

    def __init__(self, rows: list[Row[T]], weights: tuple[float, ...] | None = None) -> None:
        self._rows, self.weights = rows, weights

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Samples[T]: ...
    def __getitem__(self, index: int | slice) -> T | Samples[T]:
        if isinstance(index, slice):
            return Samples(self._rows[index], self.weights)
        return self._rows[index].build(True)

    def without_images(self, index: int) -> T:
        """Sample ``index`` with an empty list of images; nothing is decoded."""
        return self._rows[index].build(False)

    def place(self, index: int) -> Place:
        """The place of sample ``index`` in its file."""
        return self._rows[index].place

    def shares(self, index: int) -> tuple[str, ...]:
        """Names of the images of sample ``index``, or of its prompt without images; common ones belong together."""
        return self._rows[index].shares

    def take(self, indices: Iterable[int]) -> Samples[T]:
        """The samples at ``indices``, in this order; nothing is decoded."""
        return Samples([self._rows[index] for index in indices], self.weights)

    def entries(self) -> list[int]:
        """The number of the data set of each sample."""
        return [row.entry for row in self._rows]

    def fingerprint(self) -> str:
        """A hash of all rows in order, as their files hold them: texts, inline images and paths of images."""
        return hashlib.sha256(b"".join(row.digest for row in self._rows)).hexdigest()[:32]
