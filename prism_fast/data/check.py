"""All problems of a data file at once: every row is parsed and every image decoded, nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from prism_fast.data.formats import ROLES, open_samples, role_of
from prism_fast.data.notes import notes_on
from prism_fast.data.parsing import Settings
from prism_fast.data.problems import DataError
from prism_fast.data.samples import Samples
from prism_fast.data.screen import screen
from prism_fast.models.processor import Processor


@dataclass(frozen=True)
class Findings:
    """Result of a check: the ``usable`` samples of ``form`` (None where the file as a whole cannot be read), the
    problems of the others, and ``notes``, which are no problems.

    ``prompt_tokens``: lengths of the expanded prompts that could be measured, too long ones included; ``text_tokens``:
    of the texts to learn from or to score, by field. Both are empty without a processor.
    """

    path: Path
    form: str
    usable: Samples | None
    problems: list[DataError]
    notes: list[str]
    prompt_tokens: list[int]
    text_tokens: dict[str, list[int]]

    @property
    def samples(self) -> int:
        """The number of usable samples."""
        return 0 if self.usable is None else len(self.usable)


def check_file(
    path: str | Path,
    *,
    format: str | None = None,
    settings: Settings | None = None,
    own_sources: Collection[str] = (),
    processor: Processor | None = None,
    max_prompt_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Read all that ``path`` names, a file, folder, glob or hub data set, as what its first row says: demonstrations,
    tasks or pairs.

    ``format``, a key of ``ROLES``, overrides it; ``settings``: how rows are read. With a ``processor``, prompts and
    texts are encoded as in training, pixels included, and prompts of more than ``max_prompt_tokens`` are problems.
    ``own_sources``: those of ``settings.wanted.known_sources`` that functions of the user's grade. ``progress`` is
    called before every sample with the numbers of samples done and of all.
    Problems of the file as a whole (missing, no such format, wrong column types) are findings like any other.
    """
    path = Path(path)
    if format is not None and format not in ROLES:
        raise ValueError(f"format {format!r} is not known; allowed: {', '.join(ROLES)}")
    if max_prompt_tokens is not None and processor is None:
        raise ValueError("max_prompt_tokens needs a processor: tokens are those of a particular policy")
    settings = settings or Settings()
    problems: list[DataError] = []
    lengths: list[int] = []
    texts: dict[str, list[int]] = {}
    notes: list[str] = []
    form, usable = "unknown", None
    try:
        form = role_of(path, settings.columns) if format is None else format
        samples = open_samples(path, form, settings, problems=problems)
        done = count()
        found = screen(
            samples,
            processor=processor,
            max_prompt_tokens=max_prompt_tokens,
            problems=problems,
            each=lambda: progress(next(done), len(samples)),
            encode=processor is not None,
        )
        usable, lengths, texts = found.samples, found.prompt_tokens, found.text_tokens
        if form == "tasks":
            notes = notes_on(usable, own=own_sources)
    except DataError as error:
        problems.append(error)
    return Findings(path, form, usable, problems, notes, lengths, texts)
