"""The child process that runs math-verify. Started by path, never imported by the package; reads and writes
length-prefixed JSON on its pipes.

Message: four bytes (big-endian length) and a UTF-8 JSON object. On start the worker says `{"ready": true}` or
`{"failure": "..."}`. A request is `{"question": [[{"gold", "answer", "method"}, ...], ...], "cpu_s": float}`, the reply
`{"holds": bool, "errors": [str, ...]}`.

math-verify guards itself with SIGALRM, which works in main threads only and cannot interrupt C code; here its timers
are off. Three limits hold instead: the parent's wall clock, a CPU timer per request (SIGPROF with its default action,
so the kernel ends the process even inside one long big-integer operation, and an orphan cannot run on), and RLIMIT_AS.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from types import ModuleType

_LENGTH = 4


def main(memory_mb: int) -> None:
    """Serve requests until the parent closes the pipe."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # output of libraries must not enter the protocol
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    try:
        methods = _methods()
    except ImportError as error:
        _write(replies, {"failure": f"{type(error).__name__}: {error}"})
        return
    _write(replies, {"ready": True})
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        reply = _answer(request["question"], methods)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(replies, reply)


def _answer(question: list, methods: dict) -> dict:
    errors: list[str] = []

    def holds(probe: dict) -> bool:
        try:
            return bool(methods[probe["method"]](probe["gold"], probe["answer"]))
        except MemoryError:  # at the limit: this process cannot be trusted any more
            os._exit(1)
        except Exception as error:  # libraries may raise anything on unreadable text: reported, never "correct"
            errors.append(f"{type(error).__name__}: {error}"[:200])
            return False

    return {"holds": all(any(holds(probe) for probe in alternatives) for alternatives in question), "errors": errors}


def _methods() -> dict:
    """Ways to compare. `latex` and `rounded` (the default semantics: exact, and with a rounded decimal on a side) read
    LaTeX only, which needs no evaluation of text as Python; the others are the published calls."""
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.antlr_parser import PSParser
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify
    from math_verify.parser import parse_latex_cached
    from sympy import S, simplify

    algebra = _load_algebra()
    plain = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
        )
    )
    gold_order = (LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig())
    answer_order = (ExprExtractionConfig(), LatexExtractionConfig(), StringExtractionConfig())

    atom, accessor = PSParser.AtomContext, getattr(PSParser.AtomContext, "FUNC_GAMMA", lambda self: None)

    def read_percent(readable: bool) -> None:
        """Whether LaTeX like `50\\%` can be read, whatever antlr runtime is there. The parser generated for antlr 4.9
        lacks one accessor, and what asks for it on the way to a percentage raises: the published code is bound to that
        version. Those for newer antlr have it; with 4.9 an accessor that finds nothing is all that is missing."""
        if readable != hasattr(atom, "FUNC_GAMMA"):
            if readable:
                atom.FUNC_GAMMA = accessor
            else:
                del atom.FUNC_GAMMA
            parse_latex_cached.cache_clear()  # holds results of the other way of reading

    def compared(gold: str, answer: str, rounded: bool) -> bool:
        read_percent(True)
        sides = [
            parse(f"${text}$", [plain], fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
        ]
        if not all(sides):
            raise ValueError("not readable as LaTeX")
        if any(side[0].has(S.NaN, S.ComplexInfinity) for side in sides):
            raise ValueError("undefined value")
        return algebra.same(
            sides[0][0],
            sides[1][0],
            rounded,
            lambda: verify(sides[0], sides[1], timeout_seconds=None, raise_on_error=True),
        )

    def latex(gold: str, answer: str) -> bool:
        return compared(gold, answer, False)

    def rounded(gold: str, answer: str) -> bool:
        return compared(gold, answer, True)

    def published(gold: str, answer: str) -> bool:
        read_percent(False)
        return verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)

    def boxed(gold: str, answer: str) -> bool:
        read_percent(False)
        sides = [
            parse(f"\\boxed{{{text}}}", order, parsing_timeout=None)
            for text, order in ((gold, gold_order), (answer, answer_order))
        ]
        return verify(*sides, timeout_seconds=None)

    def difference(gold: str, answer: str) -> bool:
        read_percent(False)
        sides = [
            parse(f"${text}$", [plain], fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
        ]
        return all(sides) and simplify(sides[0][0] - sides[1][0]) == 0

    return {"latex": latex, "rounded": rounded, "published": published, "boxed": boxed, "difference": difference}


def _load_algebra() -> ModuleType:
    """The neighbouring file, by path: this process does not import the package."""
    spec = importlib.util.spec_from_file_location("prism_algebra", Path(__file__).with_name("algebra.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(descriptor: int) -> dict | None:
    header = _read_bytes(descriptor, _LENGTH)
    if header is None:
        return None
    body = _read_bytes(descriptor, int.from_bytes(header, "big"))
    return None if body is None else json.loads(body)


def _read_bytes(descriptor: int, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        piece = os.read(descriptor, count - len(data))
        if not piece:
            return None
        data += piece
    return data


def _write(descriptor: int, message: dict) -> None:
    body = json.dumps(message).encode()
    data = len(body).to_bytes(_LENGTH, "big") + body
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
