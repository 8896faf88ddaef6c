"""Percentages in LaTeX: read by the default, unreadable to the published graders, whichever antlr runtime is there."""

import pytest
from latex2sympy2_extended.antlr_parser import PSParser

from prism_fast.rewards import AnswerChecker
from prism_fast.rewards.worker import _methods
from tests.rewards.cases import judged

ATOM = PSParser.AtomContext


@pytest.fixture(params=["antlr 4.9", "newer antlr"])
def methods(request, monkeypatch):
    """The worker's ways to compare on a parser generated for either runtime; they differ in this accessor."""
    newer = getattr(ATOM, "FUNC_GAMMA", lambda self: None)
    monkeypatch.setattr(ATOM, "FUNC_GAMMA", newer, raising=False)  # so that it is put back afterwards
    if request.param == "antlr 4.9":
        del ATOM.FUNC_GAMMA
    yield _methods()
    ATOM.FUNC_GAMMA = newer


def test_each_way_reads_its_own(methods):
    for _ in range(2):  # alternating, so that neither may remember what the other has read
        assert methods["latex"](r"\frac{1}{2}", r"50\%")
        for answer in ("50%", r"50\%", "50 %"):
            assert not methods["boxed"]("0.5", answer) and not methods["boxed"]("50", answer)
        assert methods["boxed"]("0.5", r"\frac{1}{2}")
        assert methods["published"]("$0.5$", "50%")  # not LaTeX: a number with a percent sign


def test_both_semantics():
    with AnswerChecker(timeout_s=20) as ours, AnswerChecker(semantics="released", timeout_s=20) as released:
        response = judged(r"50\%", r"\frac{1}{2}", "math-77k")
        assert (ours.score([response])[0].accuracy, released.score([response])[0].accuracy) == (1.0, 0.0)
