"""Nasty answers against ordinary ground truths: none is correct, each is decided in time, none needs the timeout."""

import time

import pytest

from prism_fast.rewards import AnswerChecker, Judged
from tests.rewards.cases import judged
from tests.rewards.test_rules import DIFFERENT

TOWERS = [
    "9**9**9",
    "9^9^9",
    "9^{9^{9}}",
    "(9^9)^9",
    "((9^9)^9)^9",
    "9!!!",
    "999999!",
    "(99!)!",
    "2^{99999}",
    "(2^999)^999",
    "1e999999",
    "10^{10^{10}}",
    "2^{2^{2^{2^{2}}}}",
]
NESTED = [
    "\\frac{1}{" * 30 + "1" + "}" * 30,
    "\\frac{" * 200 + "1" + "}{2}" * 200,
    "\\sqrt{" * 100 + "2" + "}" * 100,
    "(" * 10**6 + ")" * 10**6,
    "(" * 500 + "1" + ")" * 500,
    "(" * 400,
    ")" * 400,
    "\\{" * 100 + "\\}" * 100,
    "\\boxed{" * 100 + "6" + "}" * 100,
    "\\text{" * 100 + "}" * 100,
    "\\left(" * 100,
    "[(" * 200 + ")]" * 200,
]
LARGE = [
    "x" * 10**6,
    "7" * 10**6,
    "1" * 1023,
    "x" * 1023,
    "1+" * 500 + "1",
    "-" * 800 + "5",
    ",".join(map(str, range(200))),
    "{" + ",".join(map(str, range(200))) + "}",
    "1;" * 400,
    "=" * 500,
    "x=" * 300 + "6",
    "x<" * 100 + "1",
    "|" * 300,
    "(1)" * 300,
    "(A)" * 300,
    "$" * 900,
    "**" * 400,
    "a b " * 250,
    "the answer is " * 70,
    "1 " * 500,
    "1," * 500,
    "5 cm " * 200,
    "、" * 1000,
    "½" * 500,
]
CALCULUS = [
    r"\int_0^1 x^{x^{x}} dx",
    r"\sum_{n=1}^{10^{9}} \frac{1}{n^2}",
    r"\prod_{k=1}^{10^6} k",
    r"\int e^{x^2}\sin(x^3) dx",
    r"\int_0^{\infty} \frac{\sin x^{3}}{x^{5}+1} dx",
    r"(x+y+z)^{99}",
    r"(x+1)^{999}",
    r"\binom{10^9}{10^8}",
    r"\binom{99999}{5000}",
    r"\tan(10^{99})",
    r"e^{e^{e^{e}}}",
    r"\zeta(3)",
    r"i^{i^{i}}",
    r"\Gamma(99.5)",
    r"\lim_{x\to 0} \frac{\sin x}{x}",
]
CODE = [
    "__import__('os').system('true')",
    "().__class__.__mro__",
    "lambda: 5",
    "exec('5')",
    "5 if 1 else 5",
    "\\input{/etc/passwd}",
    "\\def\\a{\\a\\a}\\a",
    "{5!r}",
    "%s",
    "${x}",
    "<script>5</script>",
]
STRANGE = [
    "\x00\x01\x02",
    "\ud800",
    "\u202e5",
    "\u200b5",
    "\ufeff5",
    "5\u0301",
    "٥",
    "५",
    "Ⅴ",
    "⑤",
    "𝟓",
    "1_000",
    "0x5",
    "0b101",
    "5j",
    "5e",
    "5..5",
    "5/0",
    "0/0",
    "\\frac{0}{0}",
    "0^{-1}",
    "nan",
    "-nan",
    "(nan,1)",
    "inf",
    "\\5",
    "5\\",
    "{5",
    "[5",
    "(5",
    "5^",
    "5_",
    "?",
    "...",
    "<answer>5",
    "5</answer><answer>5",
    "5 of 7",
    "5 or 6",
    "not 5",
    "5!",
    "5'",
    "55",
    "5 5",
]
ANSWERS = [*TOWERS, *NESTED, *LARGE, *CALCULUS, *CODE, *STRANGE]
GOLDS = ["5", "x^2+1", "(1,2)", "B"]


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=10) as checker:
        checker.score([judged("1+x", "x+1")])  # the start of the worker is not part of anybody's time
        yield checker


def test_the_corpus_is_large():
    assert len(set(ANSWERS)) == len(ANSWERS) >= 110


@pytest.mark.parametrize("gold", GOLDS)
def test_none_is_correct_and_none_times_out(checker, gold):
    for answer in ANSWERS:
        start = time.process_time()
        (reward,) = checker.score([judged(answer, gold)])
        assert reward.accuracy == 0.0, answer[:80]
        assert reward.decided_by not in ("timeout", "worker_died"), answer[:80]
        assert time.process_time() - start < 2.0, answer[:80]  # this process; the worker's time is limited by the pool


def test_different_answers_stay_different(checker):
    """The pairs that the rules alone must not call equal are not called equal by math-verify either."""
    pairs = [pair for pairs in DIFFERENT.values() for pair in pairs]
    rewards = checker.score([judged(answer, gold) for gold, answer in pairs])
    for pair, reward in zip(pairs, rewards, strict=True):
        assert reward.accuracy == 0.0, (pair, reward)


FORMULAS = [
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("1024", "2^10"),
    ("x+y=3", "y+x=3"),
    ("y=2x+1", "y=1+2x"),
    ("\\pi", "π"),
    ("\\sqrt{2}", "sqrt(2)"),
    ("\\sqrt{2}", "√2"),
    ("{1, \\sqrt{4}}", "{2, 1}"),
    ("x \\ge 3", "x >= 3"),
    ("5", "2+3=5"),
    ("2\\sqrt{3} cm", "\\sqrt{12} cm"),
    ("3, 2\\sqrt{3}", "3, \\sqrt{12}"),
    ("\\frac{\\pi}{2}", "\\pi/2"),
    ("-x", "-1x"),
]


def test_equal_formulas_are_found(checker):
    rewards = checker.score([judged(answer, gold) for gold, answer in FORMULAS])
    for pair, reward in zip(FORMULAS, rewards, strict=True):
        assert reward.accuracy == 1.0, (pair, reward)


def test_unequal_formulas_are_denied(checker):
    """Every formula against the next one's ground truth."""
    golds = [gold for gold, _ in FORMULAS]
    wrong = [
        (gold, answer) for gold, (_, answer) in zip(golds[1:] + golds[:1], FORMULAS, strict=True) if gold != answer
    ]
    wrong = [pair for pair in wrong if pair not in [("\\sqrt{2}", "sqrt(2)")]]
    rewards = checker.score([judged(answer, gold) for gold, answer in wrong])
    assert [pair for pair, reward in zip(wrong, rewards, strict=True) if reward.accuracy] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>5</answer>",
        "<caption></caption>" * 50_000,
        "<think></think><answer></answer>" * 30_000,
        "<caption>c</caption><think>" + "</think><answer>5</answer>" * 20_000 + "x",
    ],
)
@pytest.mark.parametrize("semantics", ["prism_fast", "released"])
def test_malformed_responses_are_refused_quickly(text, semantics):
    with AnswerChecker(semantics=semantics) as checker:
        start = time.process_time()
        (reward,) = checker.score([Judged(text, "5", "mm_gad")])
        assert time.process_time() - start < 1.0
        assert reward.score == 0.0 and reward.decided_by == "bad_format" and checker.worker_pids == []
