"""Property: a number is the same answer however it is written, and another number is not, whatever it is dressed in."""

from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_fast.rewards.compare import compare
from prism_fast.rewards.compare.numbers import Number, parse_number, same_number
from prism_fast.rewards.compare.rules import normalise

WHOLE = st.integers(-(10**12), 10**12)
DECIMAL = st.decimals(-(10**9), 10**9, allow_nan=False, allow_infinity=False, places=4)


def _spellings(value):
    """Ways to write the exact decimal `value` (a string in plain notation)."""
    sign, digits = ("-", value[1:]) if value.startswith("-") else ("", value)
    whole, _, part = digits.partition(".")
    tail = f".{part}" if part else ""
    grouped = f"{int(whole):,}"
    yield value
    yield f"{sign}{grouped}{tail}"
    yield f"{sign}{grouped.replace(',', '{,}')}{tail}"
    yield f"{sign}{grouped.replace(',', chr(0x202F))}{tail}"
    yield f"{sign}00{digits}"
    yield f"{value}{'0' if part else '.0'}"
    yield f"\u2212{digits}" if sign else f"+{digits}"
    yield f"{value}e0"
    yield f"{value} \\times 10^{{0}}"
    yield "".join(chr(ord(c) + 0xFEE0) for c in value)
    fraction = Fraction(value)
    yield f"{fraction.numerator}/{fraction.denominator}"
    yield f"{'-' if fraction < 0 else ''}\\dfrac{{{abs(fraction.numerator)}}}{{{fraction.denominator}}}"


DRESSES = [
    "{}",
    " {} ",
    "${}$",
    "\\({}\\)",
    "\\[{}\\]",
    "\\boxed{{{}}}",
    "**{}**",
    "{}.",
    "The answer is {}",
    "Answer: {}",
    "x = {}",
]


@settings(deadline=None, max_examples=200)
@given(value=st.one_of(WHOLE.map(str), DECIMAL.map(lambda d: format(d, "f"))), dress=st.sampled_from(DRESSES))
def test_every_spelling_is_the_same_number(value, dress):
    for spelling in _spellings(value):
        for gold, answer in ((value, spelling), (spelling, value)):
            verdict = compare(gold, dress.format(answer))
            assert verdict.correct is True, (gold, dress.format(answer), verdict)


@settings(deadline=None, max_examples=200)
@given(one=WHOLE, other=WHOLE, dress=st.sampled_from(DRESSES))
def test_another_whole_number_is_never_the_same(one, other, dress):
    assume(one != other)
    for spelling in _spellings(str(other)):
        verdict = compare(str(one), dress.format(spelling))
        assert verdict.correct is False, (one, spelling, verdict)


@settings(deadline=None, max_examples=200)
@given(gold=DECIMAL.filter(bool), relative=st.integers(-(10**7), 10**7))
def test_the_tolerance_is_one_in_a_million_of_the_ground_truth(gold, relative):
    gold, error = Fraction(gold), Fraction(relative, 10**12)
    answer = gold * (1 + error)
    both_whole = gold.denominator == answer.denominator == 1
    expected = answer == gold if both_whole else abs(error) <= Fraction(1, 10**6)
    assert same_number(Number(gold, True), Number(answer, True)) == expected


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789.,/-+eE _xj{}\\frac٣½", max_size=12))
def test_the_parser_reads_only_what_it_can_write(text):
    """No exception on any text; what is read as a number is finite and contains an ASCII digit."""
    number = parse_number(text)
    if number is not None:
        assert any(character in "0123456789" for character in text)
        assert isinstance(number.value, Fraction)


@settings(deadline=None, max_examples=300)
@given(gold=st.text(max_size=40), answer=st.text(max_size=40))
def test_any_two_texts_are_compared_without_an_exception(gold, answer):
    compare(gold, answer)
    if "nan" not in normalise(gold).lower():
        assert compare(gold, gold).correct is bool(normalise(gold))
