"""What a user should know about tasks that are read without an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from prism_fast.data.grammar import asks_for_sections
from prism_fast.data.samples import Samples, Task
from prism_fast.data.tasks import DEFAULT_SOURCE


def notes_on(tasks: Samples[Task], *, own: Collection[str] = ()) -> list[str]:
    """Sentences about ``tasks``: rows that the default rules grade because nobody knows their
    data_source, and prompts that do not ask for the form without which no answer earns a reward.

    ``own``: data sources that the recipe's own functions grade; they decide about the form themselves.
    """
    unknown: Counter[str] = Counter()
    graded, unasked = 0, []
    for index in range(len(tasks)):
        task = tasks.without_images(index)
        if (source := task.extra.get("data_source")) is not None and task.data_source == DEFAULT_SOURCE:
            unknown[source] += 1
        if task.data_source not in own:
            graded += 1
            if not asks_for_sections(task.messages):
                unasked.append(index)
    notes = [
        f"no reward is known for data_source {source!r}: its {count} rows are graded by the rules of {DEFAULT_SOURCE}"
        for source, count in unknown.items()
    ]
    if unasked:
        first = tasks.place(unasked[0]).row
        notes.append(
            f"{len(unasked):,} of {graded:,} prompts (first: {first}) do not ask for "
            "<caption>, <think> and <answer>, and an answer without them earns no reward, whatever it says: a policy "
            "that has not learnt this form earns nothing. data.system_prompt=published asks for it"
        )
    return notes
