"""What a user should know about tasks that are read without an error."""

from __future__ import annotations

from collections import Counter

from prism_fast.data.samples import Samples, Task
from prism_fast.data.tasks import DEFAULT_SOURCE

_LOOKED_AT = 200  # prompts, evenly spaced, in which the response grammar is looked for


def notes_on(tasks: Samples[Task], name: str) -> list[str]:
    """Sentences about ``tasks`` of ``data.<name>``: rows that the default rules grade because nobody knows their
    data_source, and prompts that do not ask for the form without which no answer earns a reward."""
    unknown: Counter[str] = Counter()
    asks = False
    step = -(-len(tasks) // _LOOKED_AT)
    for index in range(len(tasks)):
        task = tasks.without_images(index)
        if (own := task.extra.get("data_source")) is not None and task.data_source == DEFAULT_SOURCE:
            unknown[own] += 1
        if index % step == 0:
            asks = asks or any("<caption>" in str(message["content"]) for message in task.messages)
    notes = [
        f"data.{name}: no reward is known for data_source {source!r}: its {count} rows are graded by the rules of "
        f"{DEFAULT_SOURCE}"
        for source, count in unknown.items()
    ]
    if not asks:
        notes.append(
            f"data.{name}: no prompt asks for <caption>, <think> and <answer>, without which no answer earns a reward; "
            "data.system_prompt=published asks for them"
        )
    return notes
