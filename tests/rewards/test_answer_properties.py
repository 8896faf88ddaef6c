"""Properties of the comparison: an answer is itself, both directions agree where the specification has no direction,
and units convert there and back."""

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.rewards.compare import compare
from prism_fast.rewards.compare.quantities import read_quantities
from prism_fast.rewards.compare.rules import normalise
from prism_fast.rewards.compare.units import read_unit
from tests.rewards.test_answer_pairs import EXCUSED, FOLDER

PAIRS = [
    json.loads(line)
    for file in ("pairs.jsonl", "unseen.jsonl")
    for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()
]
# What only an answer may be: a sentence that chooses or affirms, a chain that ends in the value.
ONE_WAY = ("MC", "MC9", "W", "YN")
CONVERTIBLE = [
    ("km", "m"),
    ("h", "min"),
    ("kg", "g"),
    ("L", "mL"),
    ("kW", "W"),
    ("kPa", "Pa"),
    ("km/h", "m/s"),
    ("g/cm^3", "kg/m^3"),
    ("ft", "inches"),
    ("°C", "°F"),
    ("weeks", "days"),
    ("dm^2", "cm²"),
    ("MHz", "Hz"),
    ("dollars", "cents"),
    ("小时", "分钟"),
    ("吨", "公斤"),
]


def test_everything_is_itself():
    for text in dict.fromkeys(side for pair in PAIRS for side in (pair["gold"], pair["answer"])):
        assert compare(text, text).correct is True, text


def test_wrong_pairs_are_wrong_both_ways():
    """What rules call wrong one way they never call right the other way."""
    for pair in PAIRS:
        if not pair["correct"]:
            assert compare(pair["answer"], pair["gold"]).correct is not True, pair


def test_right_pairs_are_right_both_ways():
    for pair in PAIRS:
        if pair["correct"] and pair["kind"] not in ONE_WAY and (pair["gold"], pair["answer"]) not in EXCUSED:
            chain = pair["answer"].count("=") - pair["answer"].count("x =") > 0
            if compare(pair["gold"], pair["answer"]).correct and not chain:
                assert compare(pair["answer"], pair["gold"]).correct is not False, pair


@settings(deadline=None, max_examples=150)
@given(value=st.fractions(Fraction(1, 1000), 10**6, max_denominator=1000), units=st.sampled_from(CONVERTIBLE))
def test_units_convert_there_and_back(value, units):
    one, other = (read_unit(normalise(f"5 {name}").removeprefix("5").strip()) for name in units)
    assert one is not None and other is not None and one.dimension == other.dimension
    there = (value * one.scale + one.offset - other.offset) / other.scale
    text = f"{there.numerator}/{there.denominator} {units[1]}"
    assert compare(f"{value.numerator}/{value.denominator} {units[0]}", text).correct is True
    more = there + abs(there) / 100 + 1
    assert compare(f"{value.numerator}/{value.denominator} {units[0]}", f"{more} {units[1]}").correct is False


@pytest.mark.parametrize("text", ["5 pm", "5 a", "5 are", "5 __class__", "5 exec", "5 meter**9**9", "5 m^99", "5 kmm"])
def test_what_the_table_does_not_have_is_no_unit(text):
    assert not any(reading.unit and reading.unit.dimension[0][0].startswith("[") for reading in read_quantities(text))
