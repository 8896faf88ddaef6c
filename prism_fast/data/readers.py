"""Readers by role; users' files and the built-in dataset go through the same ones.

Everything but the pixels is checked when a file is opened; images are decoded when a sample is indexed. Each error is a
`DataError` naming file, row, field and the cure. With a list ``problems`` the readers go on after a bad row: the error
is appended and the row is left out. Samples are always in file order. ``path`` may be all that a recipe may name: a
file, a folder, a glob, a hub name or a list of these. `prism_fast.data.formats.FORMATS` has the formats.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from prism_fast.data.formats import open_samples
from prism_fast.data.images import DEFAULT_MAX_IMAGE_PIXELS
from prism_fast.data.parsing import Settings, Wanted
from prism_fast.data.problems import DataError
from prism_fast.data.samples import Demonstration, Pair, Samples, Task
from prism_fast.data.system_prompt import PUBLISHED_SYSTEM_PROMPT

Paths = str | Path | Sequence[str | Path]
Problems = list[DataError] | None


def read_sharegpt(
    path: Paths,
    *,
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    problems: Problems = None,
) -> Samples[Demonstration]:
    """SFT demonstrations: ShareGPT and LLaVA (``conversations``: turns ``from``/``value``), ``messages``
    (``role``/``content``, a text or typed parts), TRL's ``prompt`` and ``completion``, Alpaca (``instruction``,
    ``input``, ``output``).

    Optionally images (paths are relative to ``image_root``, by default the file's folder), ``system`` and ``id``. The
    last turn, the assistant's, is the response; earlier assistant turns stay in the prompt.
    """
    settings = Settings(image_root=image_root, max_image_pixels=max_image_pixels)
    return open_samples(path, "demonstrations", settings, problems=problems)


def read_tasks(
    paths: Paths,
    *,
    require_teacher: bool,
    known_sources: Collection[str] | None = None,
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    problems: Problems = None,
) -> Samples[Task]:
    """Alignment, RLVR or evaluation tasks, in order: verl's columns ``prompt`` and ``reward_model``, or EasyR1's
    ``problem`` and ``answer``.

    ``data_source``, images, ``answer`` and ``extra_info`` are optional; ``require_teacher`` asks for
    ``teacher_response`` in every row, out of which ``teacher_caption`` and ``teacher_cot`` are cut where they are not
    given. ``known_sources`` are the values of ``data_source`` that can be graded (None: any): a row without one, or
    with another one, gets `prism_fast.data.tasks.DEFAULT_SOURCE`. An ``answer`` that differs from the ground truth is
    kept in ``extra``. ``extra_info`` may hold ``uid``, ``question``, ``kind`` and ``cluster``; its other entries become
    ``extra`` (entries that are null are left out: parquet cannot tell them from absent ones). Tasks without a uid are
    called ``<file stem>-<row>``, with the file's number before it where several files are given.
    """
    wanted = Wanted(require_teacher=require_teacher, known_sources=known_sources)
    settings = Settings(wanted, image_root=image_root, max_image_pixels=max_image_pixels)
    return open_samples(paths, "tasks", settings, problems=problems)


def read_pairs(
    path: Paths,
    *,
    require: Sequence[str] = (),
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    system_prompt: str = PUBLISHED_SYSTEM_PROMPT,
    problems: Problems = None,
) -> Samples[Pair]:
    """Discriminator warm-up pairs: ``prompt`` (a text, or turns) or ``question``, images, and the texts
    ``teacher_caption``, ``student_caption``, ``teacher_cot``, ``student_cot``, or ``teacher_response`` and
    ``student_response``, or all six; ``require`` names those that every row must have.

    In a prompt of one text without an ``<image>`` marker the images come before the text. ``system`` may give the
    system prompt of a row (null: none); rows without it get ``system_prompt``.
    """
    settings = Settings(
        Wanted(pair_texts=tuple(require)),
        image_root=image_root,
        max_image_pixels=max_image_pixels,
        system_prompt=system_prompt,
    )
    return open_samples(path, "pairs", settings, problems=problems)
