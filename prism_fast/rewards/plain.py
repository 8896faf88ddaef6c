"""Plain reward functions, with the signature that users of TRL know: ``def reward(completions, **kwargs) -> list``.

They get lists with one entry per response, by keyword, and give one number per response. TRL 1.16 is the model: prompts
are chat turns, ``completions`` are read as text or as messages, ``None`` says that the reward does not apply.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

from prism_fast.data.grammar import split_text
from prism_fast.rewards.reward import Judged, Reward, RewardResultError, place_of

PUBLISHED = ("prompts", "completions", "completion_ids")
_NOT_GIVEN = {
    "completion_ids": "token ids are not given (rlvr.overlong_buffer rewards length)",
    "trainer_state": "the trainer's state is not given: a reward must be the same for the same response",
    "log_extra": "return a mapping with 'score' and the numbers to log",
    "log_metric": "return a mapping with 'score' and the numbers to log",
    "environments": "environments are not supported",
}
_VERDICT = ("score", "accuracy", "format")


class Completion(str):
    """The text of a response, which can also be read as the conversation that it is: ``completion[0]["content"]``.

    TRL gives text or a list of one message, by the form of the data set; functions of both kinds exist, and a wrong
    guess would not always be an error (``"7" in [message]`` is False).
    """

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, int) and key in (0, -1):
            return _Message(self[key : key + 1 or None], str(self))
        return super().__getitem__(key)


class _Message(str):
    """The first or last character of a response, which can also be read as its message."""

    def __new__(cls, character: str, content: str) -> _Message:
        made = super().__new__(cls, character)
        made.message = {"role": "assistant", "content": content}
        return made

    def __getitem__(self, key: Any) -> str:
        return self.message[key] if isinstance(key, str) else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.message.get(key, default)


def is_plain(signature: inspect.Signature) -> bool:
    """Whether a function is called as TRL calls it: it has a parameter of TRL's, or takes any keyword."""
    parameters = signature.parameters.values()
    return any(p.name in PUBLISHED or p.kind is p.VAR_KEYWORD for p in parameters)


def adapted(function: Callable[..., Any], signature: inspect.Signature) -> Callable[[Sequence[Judged]], list[Reward]]:
    """``function`` as a ``RewardFunction``.

    It gets those of these keywords that it can take, each a list with one entry per response: ``prompts`` (chat turns),
    ``completions`` (`Completion`), ``solution``, ``answer`` and ``ground_truth`` (the ground truth), ``data_source``,
    ``question``, ``equivalent_answers``, ``uid``, and the columns of the rows (None where a row lacks one; a row's own
    ``solution`` or ``answer`` comes first).

    It gives, per response, a number, None, or a mapping with the number or None as ``score``. A number above 0 counts
    as a right answer, and the format is that of ``data.grammar``, unless the mapping has ``accuracy`` or ``format``;
    its other entries are the reward's parts.

    Raises:
        ValueError: it is asynchronous, or wants a keyword of TRL's that does not exist here.
        RewardResultError (the adapted function): a keyword that it needs is in no row, or a result is none of these.
    """
    if inspect.iscoroutinefunction(function):
        raise ValueError("is asynchronous; write it as a plain def")
    parameters = signature.parameters.values()
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            raise ValueError(f"takes {p.name!r} by position only; everything is given by keyword")
        if p.name in _NOT_GIVEN and p.default is p.empty:
            raise ValueError(f"wants {p.name!r}: {_NOT_GIVEN[p.name]}")
    names = {p.name for p in parameters}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    by = getattr(function, "__name__", type(function).__name__)

    def call(responses: Sequence[Judged]) -> list[Reward]:
        if not responses:
            return []
        given = keywords(responses)
        if missing := [name for name in needed if name not in given]:
            raise RewardResultError(f"needs {', '.join(missing)}; the rows have {', '.join(given)}")
        found = function(**{name: values for name, values in given.items() if takes_any or name in names})
        values = _listed(found)
        if len(values) != len(responses):
            raise RewardResultError(
                f"gave {len(values)} rewards for {len(responses)} responses; one for each, in order"
            )
        return [_reward(value, responses, index, by) for index, value in enumerate(values)]

    return call


def keywords(responses: Sequence[Judged]) -> dict[str, list[Any]]:
    """The keyword arguments that a plain function can take, for a batch of responses; see `adapted`."""
    given: dict[str, list[Any]] = {
        "prompts": [copy.deepcopy(list(r.messages)) for r in responses],  # a function may change them; the task's stay
        "completions": [Completion(r.text) for r in responses],
    }
    truth = [r.ground_truth for r in responses]
    fixed = {"data_source": [r.data_source for r in responses], "question": [r.question for r in responses]}
    fixed |= {"equivalent_answers": [list(r.equivalent_answers) for r in responses], "uid": [r.uid for r in responses]}
    fixed["ground_truth"] = truth
    own = [name for name in dict.fromkeys(key for r in responses for key in r.columns) if name not in given | fixed]
    columns = {name: [copy.deepcopy(r.columns.get(name)) for r in responses] for name in own}
    for name in ("solution", "answer"):
        mine = columns.get(name, [None] * len(truth))
        columns[name] = [value if value is not None else gold for value, gold in zip(mine, truth, strict=True)]
    return given | fixed | columns


def _listed(found: Any) -> list[Any]:
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        raise RewardResultError(f"gave a {type(found).__name__}, not a list with one number for each response")
    return list(found)


def _reward(value: Any, responses: Sequence[Judged], index: int, by: str) -> Reward:
    """The reward of response ``index`` from the function's entry for it."""
    entry = dict(value) if isinstance(value, Mapping) else {"score": value}
    try:
        numbers = {name: None if number is None else _number(number) for name, number in entry.items()}
    except (TypeError, ValueError):
        numbers = {}
    if "score" not in numbers or any(number is None for name, number in numbers.items() if name != "score"):
        raise RewardResultError(
            f"gave {value!r:.200} for {place_of(responses, index)}; allowed: a number, None, or a mapping of numbers "
            "with 'score', which alone may be None"
        )
    score = numbers["score"]
    accuracy = numbers.get("accuracy", float(score is not None and score > 0))
    format = numbers["format"] if "format" in numbers else float(split_text(responses[index].text).valid)
    parts = {name: number for name, number in numbers.items() if name not in _VERDICT}
    return Reward(score, accuracy, format, by if score is not None else "not_scored", parts)


def _number(value: Any) -> float:
    """Numbers of Python, numpy and torch; no texts."""
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        raise TypeError(type(value).__name__)
    return float(value)
