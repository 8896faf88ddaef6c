"""Reward functions by data source: built-in graders, and functions that a recipe names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType

from prism_fast.rewards.checker import AnswerChecker
from prism_fast.rewards.plain import adapted, is_plain
from prism_fast.rewards.reward import Judged, Reward, RewardFunction, RewardResultError, place_of
from prism_fast.rewards.routes import known_sources

PART_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,80}")
ODD_TEXTS = ("", "</answer><answer>", "<caption>\x00</caption><think>𝔘</think><answer>{\\frac{1}{</answer>", "7 " * 500)


class RewardFunctionError(ValueError):
    """A function under ``reward.functions`` is missing, raises, or has other arguments or results than it must."""


class SourceRewards:
    """Scores responses, each by the function of its data source, or by ``checker`` where none is named.

    A context manager; it closes the checker.

    Raises (construction): RewardFunctionError: a name is that of a built-in grader, or `load_function` refuses.
    """

    def __init__(self, checker: AnswerChecker, functions: Mapping[str, str]):
        """``functions``: ``package.module:function`` by data source."""
        if taken := sorted(set(functions) & set(known_sources(judge=True))):
            raise RewardFunctionError(
                f"reward.functions: {', '.join(taken)} is graded by a built-in function; give the rows of your own "
                "another data_source"
            )
        self._checker = checker
        self._thread: ThreadPoolExecutor | None = None
        self._names = dict(functions)
        self.functions = {source: load_function(source, name) for source, name in functions.items()}

    def __enter__(self) -> SourceRewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the checker's worker processes, and what `begin` started."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._checker.close()

    def begin(self, responses: Sequence[Judged]) -> Future[list[Reward]] | None:
        """Start `score` in a thread; wait for all that was started before the next `score`. None where a function of
        the recipe's grades one of them: it gets all responses of its data source in one call, in the thread of
        `score`."""
        if any(response.data_source in self.functions for response in responses):
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        return self._thread.submit(self._checker.score, responses)

    def score(self, responses: Sequence[Judged]) -> list[Reward]:
        """One reward per response, in order; each function is called once, with all responses of its data source.

        Raises:
            RewardFunctionError: a function raises, exits, or gives anything but one reward of finite numbers per
                response; it names the function, the row and the response.
            NotImplementedError, ValueError, JudgeError: as ``AnswerChecker.score``.
        """
        places: dict[str | None, list[int]] = {}
        for index, response in enumerate(responses):
            source = response.data_source if response.data_source in self.functions else None
            places.setdefault(source, []).append(index)
        rewards: dict[int, Reward] = {}
        for source, indices in places.items():
            batch = [responses[index] for index in indices]
            found = self._checker.score(batch) if source is None else self._own(source, batch)
            rewards.update(zip(indices, found, strict=True))
        return [rewards[index] for index in range(len(responses))]

    def probe(self, row: Judged) -> None:
        """Call the function of a data row with odd texts as responses, so that a wrong function is found before a run
        begins. RewardFunctionError as in `score`."""
        self._own(row.data_source, [replace(row, text=text) for text in (row.text, *ODD_TEXTS)])

    def _own(self, source: str, responses: Sequence[Judged]) -> list[Reward]:
        where = f"reward.functions.{source} ({self._names[source]})"
        function = self.functions[source]
        try:
            rewards = function(responses)
        except RewardResultError as error:
            raise RewardFunctionError(f"{where} {error}") from error
        except (Exception, SystemExit) as error:
            raise RewardFunctionError(f"{where} {_ended(error)} for {_culprit(function, responses)}") from error
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            given = f"{len(rewards)}" if isinstance(rewards, list) else f"a {type(rewards).__name__}"
            raise RewardFunctionError(
                f"{where} must give a list with one prism_fast.rewards.Reward for each of {len(responses)} responses, "
                f"in order; got {given}. (With a parameter named 'completions' it would be called as TRL calls it)"
            )
        for index, reward in enumerate(rewards):
            if trouble := _trouble(reward):
                raise RewardFunctionError(f"{where}: the reward of {place_of(responses, index)} {trouble}")
        return rewards


def _ended(error: BaseException) -> str:
    return f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {_shown(error)}"


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _culprit(function: RewardFunction, responses: Sequence[Judged]) -> str:
    """The response at which a function fails, found by giving it one at a time."""
    for index, response in enumerate(responses):
        try:
            function([response])
        except (Exception, SystemExit):
            return place_of(responses, index)
    return f"{len(responses)} responses together, though for none of them alone"


def _trouble(reward: object) -> str:
    """The fault of a reward, or "" if it has none."""
    if not isinstance(reward, Reward):
        return f"is a {type(reward).__name__}, not a prism_fast.rewards.Reward"
    if not isinstance(reward.parts, Mapping):
        return f"has parts={reward.parts!r}; they must be a mapping of names to numbers"
    for name in reward.parts:
        if not isinstance(name, str) or not PART_NAME.fullmatch(name):
            return f"has a part named {name!r}; names are letters, digits and _ . - /"
    numbers = {name: getattr(reward, name) for name in ("score", "accuracy", "format")} | dict(reward.parts)
    if reward.score is None:
        del numbers["score"]
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"has {name}={value!r}; it must be a finite number"
    return "" if isinstance(reward.decided_by, str) else f"has decided_by={reward.decided_by!r}; it must be a text"


def load_function(source: str, name: str) -> RewardFunction:
    """The function ``package.module:function`` that a recipe names for a data source; a plain one is adapted
    (`plain.adapted`).

    Raises:
        RewardFunctionError: the name has another form, the module or the function does not exist, importing it raises
            or exits, or it can be called neither with the responses nor as TRL calls its functions.
    """
    where = f"reward.functions.{source}"
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name.isidentifier() or not all(map(str.isidentifier, module_name.split("."))):
        raise RewardFunctionError(f"{where} must have the form package.module:function, got {name!r}")
    module = _import(module_name, where)
    function = getattr(module, function_name, None)
    if function is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, own, n=1)
        cure = f"Did you mean {near[0]!r}?" if near else "Define it there"
        raise RewardFunctionError(f"{where}: {module_name} ({module.__file__}) has no {function_name!r}. {cure}")
    if not callable(function):
        raise RewardFunctionError(f"{where}: {name} is a {type(function).__name__}, not a function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C has no signature; its first call is the check
        return function
    if is_plain(signature):
        try:
            return adapted(function, signature)
        except ValueError as error:
            raise RewardFunctionError(f"{where}: {name}{signature} {error}") from error
    try:
        signature.bind(())
    except TypeError as error:
        raise RewardFunctionError(
            f"{where}: {name}{signature} must take one argument, the responses (prism_fast.rewards.RewardFunction), or "
            f"as TRL's functions 'completions' and other keywords: {error}"
        ) from error
    return function


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # a module that it imports is missing
            raise RewardFunctionError(f"{where}: importing {name} failed: {error}; install that module") from error
        raise RewardFunctionError(
            f"{where}: there is no module {error.name!r}. Install it, or name its folder in the environment variable "
            "PYTHONPATH"
        ) from error
    except SystemExit as error:
        raise RewardFunctionError(
            f"{where}: importing {name} {_ended(error)}; put the module's own program under if __name__ == '__main__'"
        ) from error
    except Exception as error:
        raise RewardFunctionError(f"{where}: importing {name} raised {_shown(error)}") from error
