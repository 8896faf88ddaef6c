from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from prism_fast.data.digit_demonstrations import CONFUSIONS, SYSTEM_PROMPT, demonstration, misread, teacher_texts
from prism_fast.data.digit_questions import KINDS, Slip
from prism_fast.data.grammar import split_text
from tests.data.answers import false_statements, truth


def test_the_checker_of_statements_sees_errors():
    assert false_statements("3+8=11 +5=16 +7=23") == []
    assert false_statements("3+8=11 +5=17 +7=24") == ["11+5=17"]
    assert false_statements("3<8 8<5 7=7 9>9") == ["8<5", "9>9"]
    assert false_statements("7 and 3: 7-3=5") == ["7-3=5"]


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_is_exact_on_every_strip(kind):
    for digits in product(range(10), repeat=3):
        caption, reasoning, answer = teacher_texts(kind, digits)
        assert answer == truth(kind, digits)
        split = split_text(f"{caption}\n{reasoning}")
        assert split.valid and split.answer == answer and split.reasoning == reasoning
        assert caption == f"<caption>\n- digits: {''.join(map(str, digits))}\n</caption>"
        assert false_statements(reasoning) == []


def test_teacher_style_is_one_line_of_steps_from_the_caption():
    expected = {
        "sum": "3+8=11 +5=16",
        "maximum": "3<8 8>5",
        "even": "3 odd 8 even 5 odd: 1 even",
        "difference": "3 and 5: 5-3=2",
        "comparison": "3 and 5: 3<5",
    }
    for kind, steps in expected.items():
        answer = truth(kind, (3, 8, 5))
        _, reasoning, _ = teacher_texts(kind, (3, 8, 5))
        assert reasoning == f"<think>\n{steps}\n</think>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize("kind", KINDS)
def test_slips_change_their_step_and_what_follows_only(kind):
    rng = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(300):
        digits = tuple(rng.integers(0, 10, size=3).tolist())
        right = KINDS[kind].work(digits, None)
        for step in range(KINDS[kind].steps):
            wrong = KINDS[kind].work(digits, Slip(step, int(rng.choice([-2, -1, 1, 2]))))
            if wrong.answer != right.answer:
                assert wrong.concise != right.concise  # the spoiled step is shown
                assert wrong.terse != right.terse
            assert wrong.concise[0] == right.concise[0]
        beyond = KINDS[kind].work(digits, Slip(KINDS[kind].steps, 1))
        assert beyond == right


def test_questions_and_system_prompt_are_short():
    assert list(KINDS) == ["sum", "maximum", "even", "difference", "comparison"]
    for kind in KINDS.values():
        assert len(set(kind.phrasings)) >= 3
        assert all(len(question.split()) <= 20 for question in kind.phrasings)
    assert len(SYSTEM_PROMPT.split()) <= 25
    assert all(tag in SYSTEM_PROMPT for tag in ("<caption>", "<think>", "<answer>"))


def test_misreading_changes_something_mostly_by_confusion():
    rng = np.random.default_rng(4)
    changed = {"confused": 0, "other": 0}
    for _ in range(3000):
        digits = tuple(rng.integers(0, 10, size=3).tolist())
        seen = misread(digits, rng)
        assert seen != digits and len(seen) == 3 and all(0 <= digit <= 9 for digit in seen)
        for digit, read in zip(digits, seen, strict=True):
            if digit != read:
                changed["confused" if CONFUSIONS.get(digit) == read else "other"] += 1
    assert changed["confused"] > 2 * changed["other"] > 200


def test_demonstrations_are_faulty_at_the_asked_rate():
    rng = np.random.default_rng(8)
    for noise in (0.0, 0.35, 1.0):
        faulty = 0
        for number in range(1400):
            kind = list(KINDS)[number % 5]
            digits = tuple(rng.integers(0, 10, size=3).tolist())
            split = split_text(demonstration(kind, digits, noise, rng))
            assert split.valid
            read = re.findall(r"\d", split.caption)
            faulty += [int(digit) for digit in read] != list(digits) or split.answer != truth(kind, digits)
        assert abs(faulty / 1400 - noise) < 0.05
        if noise == 0.0:
            assert faulty == 0


def test_clean_demonstrations_mix_styles():
    rng = np.random.default_rng(1)
    texts = {demonstration("sum", (3, 8, 5), 0.0, rng) for _ in range(400)}
    captions = {split_text(text).caption for text in texts}
    thoughts = {re.search(r"<think>(.*)</think>", text, re.DOTALL)[1] for text in texts}
    assert len(captions) == 5 and len(thoughts) == 3
    assert "".join(teacher_texts("sum", (3, 8, 5))[:2]).replace("</caption>", "</caption>\n") in texts
