"""The built-in reward functions: format gate, answer comparison, reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_fast.data.samples import MAX_TRUTH_CHARS
from prism_fast.rewards.judge import Judge, JudgeQuestion
from prism_fast.rewards.pool import WorkerPool
from prism_fast.rewards.reward import Judged, Reward
from prism_fast.rewards.routes import Route, route_of
from prism_fast.rewards.rules import RULES, accepted_answers
from prism_fast.rewards.verdict import Question, Verdict

_REMEMBERED = 8192
_ENDINGS = {"error": "unreadable", "timeout": "timeout", "worker_died": "worker_died", "too_large": "too_complex"}
_NO_APPEAL = ("bad_format", "empty_answer", "overlong_answer", "not_a_number", "number", "unit")


@dataclass(frozen=True)
class _Plan:
    """What is known of one response before any worker is asked: the format part and one verdict per acceptable ground
    truth."""

    route: Route
    format: float
    verdicts: tuple[Verdict, ...]


class AnswerChecker:
    """Scores batches of responses. A context manager; reusable after `close`.

    `Reward.score` is accuracy weight · accuracy + format weight · format, with accuracy and format 0 or 1.
    `decided_by`: `bad_format`, `empty_answer` (`released` alone), `overlong_answer`, a branch of the comparison
    (`compare/rules.py`), what ended a symbolic check: `no_match`, `unreadable` (math-verify could not read a side),
    `timeout`, `worker_died`; or, where a judge was asked, `judge`, and `judge_error` when it gave no verdict.

    Rules decide in this process; only formulas that need symbolic mathematics go to worker processes, which are started
    when the first one appears (a task whose answers are numbers, words or letters never starts one). `timeout_s` and
    `memory_mb` limit each question (see `WorkerPool`). Answers of `max_answer_chars` or more get the format part only.
    Weights default to the published ones of each data source (0.8 / 0.2; geometry3k 0.9 / 0.1); given weights replace
    them all.

    `semantics="prism_fast"` grades the answer of the matched third section as ANSWERS.md says, for every
    data source, against the ground truth and all equivalent answers. `semantics="released"` reproduces the published
    graders. README.md in this folder tells the differences.

    A `judge` makes the data sources known that need one. By default it is asked where the rules find no agreement and
    have not the last word (two plain numbers have); `released` asks it about every answer, without any rule.
    """

    def __init__(
        self,
        *,
        semantics: str = "prism_fast",
        workers: int = 1,
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
        max_answer_chars: int = 1024,
        accuracy_weight: float | None = None,
        format_weight: float | None = None,
        judge: Judge | None = None,
    ):
        if semantics not in RULES:
            raise ValueError(f"semantics = {semantics!r}; allowed: {', '.join(RULES)}")
        if (accuracy_weight is None) != (format_weight is None):
            raise ValueError(
                "give both accuracy_weight and format_weight, or neither for the published ones of each data source"
            )
        if max_answer_chars < 1:
            raise ValueError(f"max_answer_chars = {max_answer_chars}; it must be at least 1")
        self.max_answer_chars = max_answer_chars
        self._rules = RULES[semantics]()
        self._weights = None if accuracy_weight is None else (accuracy_weight, format_weight)
        self._pool = WorkerPool(workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)
        self._known: dict[Question, str] = {}
        self._judge = judge

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers; empty as long as rules decided everything."""
        return self._pool.pids

    def score(self, responses: Sequence[Judged]) -> list[Reward]:
        """One reward per response, in order. NotImplementedError for an unknown data source, ValueError for an empty
        ground truth, JudgeError when the judge answers nothing at all."""
        plans = [self._plan(response, index) for index, response in enumerate(responses)]
        self._ask([verdict.question for plan in plans for verdict in _open(plan)])
        rewards = [self._reward(plan) for plan in plans]
        return rewards if self._judge is None else self._appeal(self._judge, responses, plans, rewards)

    def _appeal(
        self, judge: Judge, responses: Sequence[Judged], plans: Sequence[_Plan], rewards: list[Reward]
    ) -> list[Reward]:
        """The rewards after the judge has spoken on those that wait for it. It can only turn wrong into right."""
        waiting = [
            index
            for index, (plan, reward) in enumerate(zip(plans, rewards, strict=True))
            if plan.route.rules == "judge" and not reward.accuracy and reward.decided_by not in _NO_APPEAL
        ]
        verdicts = judge.ask([self._question(responses[i]) for i in waiting])
        for index, verdict in zip(waiting, verdicts, strict=True):
            reward, route = rewards[index], plans[index].route
            accuracy = float(verdict is True)
            accuracy_weight = (self._weights or (route.accuracy_weight, route.format_weight))[0]
            by = "judge_error" if verdict is None else "judge"
            rewards[index] = Reward(reward.score + accuracy_weight * accuracy, accuracy, reward.format, by)
        return rewards

    def _question(self, response: Judged) -> JudgeQuestion:
        accepted = tuple(accepted_answers(response.ground_truth, response.equivalent_answers))
        return JudgeQuestion(response.question, accepted, self._rules.read(response.text))

    def _plan(self, response: Judged, index: int) -> _Plan:
        route = route_of(response.data_source, judge=self._judge is not None)
        gold, equivalents = response.ground_truth, response.equivalent_answers
        if not gold.strip():
            raise ValueError(f"response {index}: the ground truth is empty (data_source {response.data_source!r})")
        if (longest := max(map(len, (gold, *equivalents)))) > MAX_TRUTH_CHARS:  # comparing is not linear in it
            raise ValueError(
                f"response {index}: an accepted answer has {longest} characters, more than {MAX_TRUTH_CHARS}"
            )
        return _Plan(route, *self._rules.grade(route, response.text, gold, equivalents, self.max_answer_chars))

    def _ask(self, questions: Sequence[Question]) -> None:
        """Fill the memory of answered questions; the same answer of many rollouts is checked once."""
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        for question in list(self._known)[: max(0, len(self._known) + len(new) - _REMEMBERED)]:
            if question not in questions:
                del self._known[question]
        self._known.update(zip(new, self._pool.ask(new) if new else (), strict=True))

    def _reward(self, plan: _Plan) -> Reward:
        decided = next((verdict for verdict in plan.verdicts if verdict.correct), None)
        by = None if decided is None else decided.by
        if decided is None:
            answers = [(verdict, self._known[verdict.question]) for verdict in _open(plan)]
            held = next((verdict for verdict, answer in answers if answer == "holds"), None)
            decided, by = held, held.by if held else None
            if held is None:
                by = _reason(plan, answers)
        accuracy = 0.0 if decided is None else 1.0
        accuracy_weight, format_weight = self._weights or (plan.route.accuracy_weight, plan.route.format_weight)
        return Reward(accuracy_weight * accuracy + format_weight * plan.format, accuracy, plan.format, str(by))


def _reason(plan: _Plan, answers: Sequence[tuple[Verdict, str]]) -> str:
    """Why no acceptable ground truth was met: the end of the first question, else the branch of the first verdict."""
    if not answers:
        return plan.verdicts[0].by
    verdict, answer = answers[0]
    return verdict.answered(False).by if answer == "fails" else _ENDINGS[answer]


def _open(plan: _Plan) -> list[Verdict]:
    """The verdicts of a plan that still need a worker; none when one of them is already correct."""
    return (
        []
        if any(verdict.correct for verdict in plan.verdicts)
        else [verdict for verdict in plan.verdicts if verdict.correct is None]
    )
