"""Tasks whose ground truth is no right answer to its own question, so that no response can earn their reward."""

from __future__ import annotations

from prism_fast.data.grammar import SECTIONS
from prism_fast.data.samples import Samples, Task
from prism_fast.rewards.checker import AnswerChecker
from prism_fast.rewards.reward import Judged
from prism_fast.rewards.routes import ROUTES

_AT_ONCE = 1024


def unearnable(tasks: Samples[Task], checker: AnswerChecker) -> list[int]:
    """The indices of tasks that ``checker`` does not count as right when a well-formed response answers with the ground
    truth itself. Tasks of sources that a judge or an own function grades are left out; no image is decoded."""
    waiting: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for index in range(len(tasks)):
        task = tasks.without_images(index)
        if task.data_source in ROUTES:
            key = (task.ground_truth, task.data_source, tuple(task.equivalent_answers))
            waiting.setdefault(key, []).append(index)
    questions = list(waiting)
    wrong: list[int] = []
    for start in range(0, len(questions), _AT_ONCE):
        some = questions[start : start + _AT_ONCE]
        rewards = checker.score([Judged(_well_formed(truth), truth, *others) for truth, *others in some])
        for key, reward in zip(some, rewards, strict=True):
            if not reward.accuracy:
                wrong += waiting[key]
    return sorted(wrong)


def _well_formed(answer: str) -> str:
    sections = dict.fromkeys(SECTIONS, "x") | {"answer": answer}
    return "\n".join(f"<{name}>\n{inside}\n</{name}>" for name, inside in sections.items())
