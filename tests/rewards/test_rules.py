"""The default rules on pairs of answers: what is the same, what is not, and that rules decide without a worker."""

import pytest

from prism_fast.rewards.compare import compare
from prism_fast.rewards.compare.structure import list_readings

SAME = {
    "numbers": [
        ("5", "5.0"),
        ("5", "005"),
        ("5", "+5"),
        ("-3", "- 3"),
        ("0.5", ".5"),
        ("1234567", "1,234,567"),
        ("1234", "1{,}234"),
        ("1000", "1 000"),
        ("0.5", "1/2"),
        ("3/4", "6/8"),
        ("3/4", r"\frac{3}{4}"),
        ("3/4", r"\dfrac34"),
        ("3.5", r"3\frac{1}{2}"),
        ("3.5", "3½"),
        ("-3/4", "3/-4"),
        ("1000", "1e3"),
        ("300", r"3 \times 10^{2}"),
        ("1/3", "0.333333"),
        ("100", "99.9999999"),
        ("5", "The answer is 5."),
        ("5", r"$\boxed{5}$"),
        ("5", "**5**"),
        ("5", "(5)"),
        ("5", "approximately 5"),
        ("5", "x = 5"),
        ("5", "5 = x"),
        ("x=5", "5"),
        ("5", "y = 5"),
        ("inf", "∞"),
        ("12", "１２"),
        ("5", "five"),
    ],
    "units": [
        ("5 cm", "5cm"),
        ("5 cm", r"5\text{ cm}"),
        ("5 cm", "5 centimeters"),
        ("1 m", "100 cm"),
        ("2 hours", "120 min"),
        ("5", "5 apples"),
        ("5 cm²", "5 cm^2"),
        ("5 cm^2", r"5~\mathrm{cm}^{2}"),
        ("30°", r"30^\circ"),
        ("20°C", "68 °F"),
        ("60 km/h", "60 km per hour"),
        ("50%", "0.5"),
        ("0.5", "50%"),
        ("50", "50%"),
        ("$5", "5 dollars"),
        ("12元", "12"),
        ("3米", "3 meters"),
        ("3 pieces", "3 items"),
        ("3 people", "3"),
        (r"2\sqrt{3} cm", r"2\sqrt{3}"),
        ("8 m", "8"),
    ],
    "words": [
        ("yes", "Yes."),
        ("yes", "(YES)"),
        ("New York", "new  york"),
        ("isn't", "Isnt"),
        ("红色", "红色。"),
        ("Paris", "**Paris**"),
        ("hello", "“Hello”"),
        ("U.S.", "US"),
        ("a", "A"),
        ("caf\u00e9", "cafe\u0301"),
        ("left", "The answer is: left"),
    ],
    "choices": [
        ("A", "(A)"),
        ("A", "a"),
        ("A", "A."),
        ("A", "A) 12 cm"),
        ("A", "(A) the left one"),
        ("A", "Option A"),
        ("A", "The correct answer is (A)."),
        ("B. red", "B"),
        ("B. red", "red"),
        ("(A) 12 cm", "12 cm"),
        ("(c) foo", "c"),
        ("A, B", "B, A"),
        ("A", r"\text{(A)}"),
    ],
    "structures": [
        ("1, 2", "1,2"),
        ("1, 2", "1; 2"),
        ("1, 2", "1 and 2"),
        ("3; 4", "(1) 3 (2) 4"),
        ("(1,2)", "( 1.0 , 2.0 )"),
        ("(1,2)", r"\left(1, 2\right)"),
        ("{1,2}", r"\{2, 1\}"),
        (r"(-\infty,3]", "(-∞, 3]"),
        (r"(0,1)\cup(2,3)", "(2,3) ∪ (0,1)"),
        ("x=1, y=2", "x = 1; y = 2"),
        ("1:2", "1 : 2"),
        ("0.5, 3", r"\frac12, 3"),
        ("1,2,3", "1, 2, 3"),
        ("P=(1,2)", "(1, 2)"),
        ("3 < 4", "3<4"),
        ("(1,2),(3,4)", "(1, 2); (3, 4)"),
        ("1,200, 5", "1200, 5"),
        ("(1,234)", "(1, 234)"),
    ],
}

DIFFERENT = {
    "numbers": [
        ("5", "6"),
        ("5", "-5"),
        ("5", "55"),
        ("5", "5.1"),
        ("5", "5e1"),
        ("0", "1e-9"),
        ("1000000", "1000001"),
        ("1", "1000001/1000000"),
        ("10000000", "10000001"),
        ("12.5", "12,5"),
        ("1/3", "0.333"),
        ("5", "3 million"),
        ("3", "3 million"),
        ("3", "3 dozens"),
        ("2", "2 thirds"),
        ("1000", "1_000"),
        ("16", "0x10"),
        ("12", "١٢"),
        ("5", "not 5"),
        ("5", "5 or 6"),
        ("5", "5, 6"),
        ("5", "5 6"),
        ("5", "4=5"),
        ("5", "5=6"),
        ("nan", "nan"),
        ("5", "nan"),
        ("(nan, 1)", "(nan, 1)"),
        ("inf", "-inf"),
        ("1e999", "1e998"),
        ("1.234", "1,234"),
        ("5", "5'"),
        ("35", "3 5"),
        ("1", "True"),
        ("5", "5:00"),
        ("1e5000", "1e5000.0"),
        ("1/0", "2/0"),
        ("12", "1 2"),
        ("5", ""),
        ("5", "5..5"),
    ],
    "units": [
        ("5 kg", "5 lb"),
        ("5 cm", "5 cm^2"),
        ("5 cm", "5 m"),
        ("20°C", "20°F"),
        ("20°C", "20°"),
        ("60 km/h", "60 km"),
        ("60 km/h", "60 m/s"),
        ("$5", "€5"),
        ("50", "0.5%"),
        ("5%", "5 cm"),
        ("3 people", "3 plates"),
        ("3 apples", "3 pears"),
        ("5 min", "5 s"),
        (r"2\sqrt{3} cm", r"2\sqrt{3} kg"),
        ("5", "6 cm"),
        ("5 cm", "cm"),
    ],
    "words": [
        ("yes", "no"),
        ("no", "on"),
        ("ABC", "ACB"),
        ("cat", "act"),
        ("yes", "yes or no"),
        ("yes", "not yes"),
        ("left", "right"),
        ("红色", "蓝色"),
        ("AB", "A B"),
        ("Paris", "Paris 5"),
        ("x", "y"),
    ],
    "choices": [
        ("A", "B"),
        ("A", "A or B"),
        ("A", "(A) and (B)"),
        ("A", "A, B"),
        ("A", "AB"),
        ("A", "not A"),
        ("A", "I choose (A) over (B)"),
        ("B", "I choose (A) over (B)"),
        ("A", "Option B, not (A)"),
        ("A", "12"),
        ("B. red", "C. red"),
        ("B. red", "blue"),
        ("(A) 12 cm", "(A) 13 cm"),
        ("(A) 12 cm", "12 kg"),
        ("A", "Z"),
        ("A, B", "A, C"),
        ("A, B", "A"),
        ("A", r"\angle A"),
    ],
    "structures": [
        ("1, 2", "2, 1"),
        ("1, 2", "1, 2, 3"),
        ("1, 2", "(1, 2)"),
        ("(1,2)", "(2,1)"),
        ("(0,1)", "[0,1]"),
        ("[0,1)", "(0,1]"),
        ("{1,2}", "(1,2)"),
        ("{1,2}", "{1,2,3}"),
        ("(1,2)", "(12)"),
        ("(1,2)", "(1,2"),
        (r"(0,1)\cup(2,3)", "(0,1)"),
        (r"(0,1)\cup(2,3)", r"(0,1)\cup(2,3]"),
        ("1:2", "12"),
        ("1:2", "2:1"),
        ("3:30", "330"),
        ("x=1, y=2", "x=2, y=1"),
        ("x=5", "y=5"),
        ("P=(1,2)", "Q=(1,2)"),
        ("3; 4", "(1) 4 (2) 3"),
        ("120", "1,20"),
        ("1,234", "1,235"),
        ("(1,234)", "(1234)"),
    ],
}


@pytest.mark.parametrize(("gold", "answer"), [pair for pairs in SAME.values() for pair in pairs])
def test_same(gold, answer):
    verdict = compare(gold, answer)
    assert verdict.correct is True, verdict


@pytest.mark.parametrize(("gold", "answer"), [pair for pairs in DIFFERENT.values() for pair in pairs])
def test_different(gold, answer):
    """False at once, or a question that the workers deny (asked in test_adversarial.py)."""
    assert compare(gold, answer).correct is not True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "7"),
        ("5", "1/3"),
        ("1e3", "999"),
        ("yes", "no"),
        ("1, 2, 3", "1, 3, 2"),
        ("A", "C"),
        ("left", "5"),
        ("5", "left"),
    ],
)
def test_rules_decide_alone(gold, answer):
    """What the digits task asks for never needs a worker, whatever plain answer comes."""
    assert compare(gold, answer).correct is False


def test_a_formula_is_a_question():
    verdict = compare("1+x^2", "x^2+1")
    assert verdict.correct is None and verdict.by == "math_verify" and len(verdict.question) == 1
    assert verdict.answered(True).correct is True
    assert verdict.answered(False).by == "no_match"
    with pytest.raises(ValueError, match="already decided"):
        verdict.answered(True).answered(True)


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("1, 2", [["1", "2"]]),
        ("1,234", [["1,234"], ["1", "234"]]),
        ("1), 2", [["1)", "2"]]),
        ("(1, 2), 3", [["(1, 2)", "3"]]),
        ("a; b, c", [["a", "b, c"]]),
        ("(1) x (2) y", [["x", "y"]]),
        ("1, 2 and 3", [["1", "2", "3"]]),
        ("salt and pepper", [["salt and pepper"]]),
        (",,", [[",,"]]),
    ],
)
def test_readings_as_a_list(text, readings):
    assert list_readings(text) == readings
