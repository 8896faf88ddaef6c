"""The built-in ``digits`` dataset: real handwritten digits, questions about them, written in the published formats.

Demonstrations for SFT are many and noisy; the alignment set is small and its teacher exact; the evaluation set asks all
kinds of question about each of its images, and every test digit is on exactly one of them, so that an image is a clean
cluster for intervals. Everything is a function of (spec, seed), down to the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from prism_fast.data.digit_demonstrations import SYSTEM_PROMPT, demonstration, teacher_texts
from prism_fast.data.digit_images import DIGITS_PER_STRIP, DigitCollection, Strip, split_pools
from prism_fast.data.digit_questions import KINDS
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.messages import IMAGE_MARKER
from prism_fast.data.samples import Demonstration, Task
from prism_fast.data.writers import write_sharegpt, write_tasks
from prism_fast.models.writing import whole_folder

DATA_SOURCE = "mm_gad"


@dataclass(frozen=True)
class DigitsFiles:
    """Where the parts are: ``sft`` and ``sft_val`` ShareGPT JSON; ``align``, ``rlvr``, ``eval`` parquet."""

    sft: Path
    sft_val: Path
    align: Path
    rlvr: Path
    eval: Path

    @classmethod
    def in_folder(cls, root: str | Path) -> DigitsFiles:
        """The files of an already written dataset; FileNotFoundError names one that is missing."""
        files = cls._under(Path(root))
        for path in asdict(files).values():
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {root} is not a complete digits folder")
        return files

    @classmethod
    def _under(cls, root: Path) -> DigitsFiles:
        names = ("sft.json", "sft_val.json", "align.parquet", "rlvr.parquet", "eval.parquet")
        return cls(*(root / name for name in names))


def write_digits(root: str | Path, spec: DigitsSpec, seed: int) -> DigitsFiles:
    """Write the dataset into the new folder ``root`` (complete or not at all; seconds); FileExistsError if it exists.

    ``digits.json`` beside the data keeps spec and seed.
    """
    root = Path(root)
    _check_values(spec)
    with whole_folder(root, flush=False) as part:
        _write_parts(DigitsFiles._under(part), spec, seed)
        record = {"dataset": "digits", "spec": asdict(spec), "seed": seed}
        (part / "digits.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return DigitsFiles.in_folder(root)


def check_digits(spec: DigitsSpec) -> None:
    """ValueError for impossible values, or where the collection has too few digits for ``spec``."""
    _check_values(spec)
    _pools(DigitCollection(), spec, np.random.default_rng(0))


def _check_values(spec: DigitsSpec) -> None:
    for name, value in asdict(spec).items():
        if name != "noise" and value < 1:
            raise ValueError(f"DigitsSpec.{name} = {value}: must be at least 1")
    for name in ("sft_questions", "sft_val_questions"):
        if getattr(spec, name) > len(KINDS):
            raise ValueError(f"DigitsSpec.{name} = {getattr(spec, name)}: there are {len(KINDS)} kinds of question")
    if not 0.0 <= spec.noise <= 1.0:
        raise ValueError(f"DigitsSpec.noise = {spec.noise}: is a share between 0 and 1")


def _pools(collection: DigitCollection, spec: DigitsSpec, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return split_pools(len(collection), spec.train_digits, spec.eval_images * DIGITS_PER_STRIP, rng)


def _write_parts(files: DigitsFiles, spec: DigitsSpec, seed: int) -> None:
    # One generator per part: changing the size of one leaves the others as they are.
    pools, sft, sft_val, align, rlvr, held_out = np.random.default_rng(seed).spawn(6)
    collection = DigitCollection()
    train, val, test = _pools(collection, spec, pools)

    strips = collection.strips(train, spec.sft_images, sft)
    write_sharegpt(files.sft, _demonstrations("sft", strips, spec.sft_questions, spec.noise, sft))
    strips = collection.strips(val, spec.sft_val_images, sft_val)
    write_sharegpt(files.sft_val, _demonstrations("sft_val", strips, spec.sft_val_questions, spec.noise, sft_val))
    for name, path, count, rng in (
        ("align", files.align, spec.align_tasks, align),
        ("rlvr", files.rlvr, spec.rlvr_tasks, rlvr),
    ):
        kinds = list(KINDS)
        asked = [(strip, [kinds[n % len(kinds)]]) for n, strip in enumerate(collection.strips(train, count, rng))]
        write_tasks(path, _tasks(name, asked, rng))
    strips = collection.strips(test, spec.eval_images, held_out)
    write_tasks(files.eval, _tasks("eval", [(strip, list(KINDS)) for strip in strips], held_out))


def _prompt(kind: str, rng: np.random.Generator) -> tuple[str, list[dict[str, Any]]]:
    """(question, messages) in one of the kind's phrasings."""
    phrasings = KINDS[kind].phrasings
    question = phrasings[int(rng.integers(len(phrasings)))]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return question, [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]


def _demonstrations(
    part: str, strips: list[Strip], questions: int, noise: float, rng: np.random.Generator
) -> Iterator[Demonstration]:
    for number, strip in enumerate(strips):
        for index in rng.permutation(len(KINDS))[:questions]:
            kind = list(KINDS)[index]
            _, messages = _prompt(kind, rng)
            response = demonstration(kind, strip.digits, noise, rng)
            yield Demonstration(f"{part}-{number:05d}-{kind}", messages, response, [strip.image])


def _tasks(part: str, asked: Iterable[tuple[Strip, list[str]]], rng: np.random.Generator) -> Iterator[Task]:
    index = 0
    for number, (strip, kinds) in enumerate(asked):
        cluster = f"{part}-{number:05d}"
        for kind in kinds:
            question, messages = _prompt(kind, rng)
            caption, reasoning, answer = teacher_texts(kind, strip.digits)
            yield Task(
                uid=f"{cluster}-{kind}",
                messages=messages,
                images=[strip.image],
                data_source=DATA_SOURCE,
                ground_truth=answer,
                question=question,
                teacher_caption=caption,
                teacher_cot=reasoning,
                teacher_response=f"{caption}\n{reasoning}",
                kind=kind,
                cluster=cluster,
                extra={"index": index, "digits": "".join(map(str, strip.digits))},
            )
            index += 1


def tokenizer_corpus(files: DigitsFiles) -> Iterator[str]:
    """Texts to learn a small vocabulary from: prompts and responses of the SFT part, then general English.

    The English is scikit-learn's bundled dataset descriptions: a few thousand entries need more words than the
    demonstrations have.
    """
    for record in json.loads(files.sft.read_text(encoding="utf-8")):
        for message in record["messages"]:
            yield f"{message['role']}\n"  # as the chat template writes it: a role should be one entry
            yield message["content"].replace(IMAGE_MARKER, "")
    descriptions = resources.files("sklearn.datasets.descr")
    for entry in sorted(descriptions.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".rst"):
            yield entry.read_text(encoding="utf-8")
