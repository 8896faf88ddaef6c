"""The checker around the comparison: gate, weights, limits, errors, order, laziness, memory of answered questions."""

import pytest

from prism_fast.rewards import ROUTES, AnswerChecker, Judged, Reward
from tests.rewards.cases import judged


def test_parts_of_the_score():
    with AnswerChecker() as checker:
        right, wrong, malformed = checker.score([judged("5", "5"), judged("6", "5"), Judged("5", "5", "mm_gad")])
        assert right == Reward(1.0, 1.0, 1.0, "exact")
        assert wrong == Reward(0.2, 0.0, 1.0, "number")
        assert malformed == Reward(0.0, 0.0, 0.0, "bad_format")


def test_weights():
    """Published weights per data source, unless the caller gives both."""
    responses = [judged("5", "5", source) for source in ROUTES] + [judged("6", "5", source) for source in ROUTES]
    with AnswerChecker() as checker:
        scores = [reward.score for reward in checker.score(responses)]
    assert scores == pytest.approx([1.0] * len(ROUTES) + [ROUTES[source].format_weight for source in ROUTES])
    assert ROUTES["hiyouga/geometry3k"].format_weight == 0.1
    with AnswerChecker(accuracy_weight=3.0, format_weight=0.5) as checker:
        assert [reward.score for reward in checker.score(responses)] == [3.5] * len(ROUTES) + [0.5] * len(ROUTES)


@pytest.mark.parametrize("options", [{"accuracy_weight": 1.0}, {"format_weight": 1.0}])
def test_half_a_pair_of_weights_is_an_error(options):
    with pytest.raises(ValueError, match="both accuracy_weight and format_weight"):
        AnswerChecker(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantics": "paper"}, "'paper'; allowed: prism_fast, released"),
        ({"max_answer_chars": 0}, "max_answer_chars = 0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        AnswerChecker(**options)


@pytest.mark.parametrize("semantics", ["prism_fast", "released"])
@pytest.mark.parametrize("source", ["mm_gad_llm", "vl_agent", "", "MM_GAD"])
def test_unknown_data_source(semantics, source):
    with AnswerChecker(semantics=semantics) as checker:
        with pytest.raises(NotImplementedError, match=f"{source!r}; known: hiyouga/geometry3k, math-77k, mm_gad"):
            checker.score([judged("5", "5"), judged("5", "5", source)])


def test_empty_ground_truth():
    with AnswerChecker() as checker:
        with pytest.raises(ValueError, match="response 1: the ground truth is empty"):
            checker.score([judged("5", "5"), judged("5", "  ")])


def test_limits_of_the_answer():
    with AnswerChecker(max_answer_chars=8) as checker:
        rewards = checker.score([judged("1234567", "1234567"), judged("12345678", "12345678"), judged("  ", "5")])
    assert [reward.decided_by for reward in rewards] == ["exact", "overlong_answer", "bad_format"]
    assert [reward.score for reward in rewards] == [1.0, 0.2, 0.0]


def test_no_worker_for_what_rules_decide():
    with AnswerChecker() as checker:
        answers = [
            "5",
            "7",
            "-3.5",
            "1/2",
            "yes",
            "no",
            "1, 2, 3",
            "3, 2, 1",
            "A",
            "(B)",
            "5 cm",
            "",
            "nonsense",
            "left",
        ]
        golds = ["5", "yes", "1, 2, 3", "A", "left"]
        checker.score([judged(answer, gold) for answer in answers for gold in golds])
        assert checker.worker_pids == []
        checker.score([judged("x+1", "1+x")])
        assert len(checker.worker_pids) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_order_is_kept(workers):
    """A mixed batch gives what its members give one by one, whatever finishes first."""
    pairs = [
        ("x+1", "1+x"),
        ("5", "5"),
        ("(x+1)^2", "x^2+1"),
        ("6", "5"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("no", "yes"),
        ("x+1", "1+x"),
    ]
    batch = [judged(answer, gold) for answer, gold in pairs]
    with AnswerChecker(workers=workers, timeout_s=20) as checker:
        rewards = checker.score(batch)
        assert [reward.accuracy for reward in rewards] == [1, 1, 0, 0, 1, 0, 1]
        assert checker.score(batch[::-1]) == rewards[::-1]
        assert [checker.score([response])[0] for response in batch] == rewards
        assert checker.score([]) == []


def test_the_same_formula_is_asked_once():
    with AnswerChecker(timeout_s=20) as checker:
        asked = []
        ask = checker._pool.ask
        checker._pool.ask = lambda questions: asked.extend(questions) or ask(questions)
        batch = [judged("x+1", "1+x")] * 8 + [judged("x+2", "1+x")] * 8
        assert [reward.accuracy for reward in checker.score(batch)] == [1.0] * 8 + [0.0] * 8
        checker.score(batch)
        assert len(asked) == 2


def test_a_timeout_is_a_reward_and_the_next_answer_is_checked():
    """The limit is met inside a batch; the released semantics sends what the default refuses beforehand."""
    with AnswerChecker(semantics="released", timeout_s=1.0) as checker:
        slow, fine = checker.score([judged("9**9**9", "7"), judged("1/2", "0.5")])
    assert slow == Reward(0.2, 0.0, 1.0, "timeout")
    assert fine == Reward(1.0, 1.0, 1.0, "math_verify")


def test_equivalent_answers_are_alternatives():
    with AnswerChecker(timeout_s=20) as checker:
        for answer, accuracy in (("5", 1.0), ("x+1", 1.0), ("six", 1.0), ("7", 0.0)):
            (reward,) = checker.score([judged(answer, "5", equivalents=("1+x", "six", "", "__EMPTY__"))])
            assert reward.accuracy == accuracy, answer
