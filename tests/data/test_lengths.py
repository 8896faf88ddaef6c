from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_fast.data.lengths import fit_length, response_mask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "data_prep.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["postprocess"], ids=lambda c: f"{len(c['input'])}-{c['truncation']}")
def test_published_padding_and_truncation(case):
    options = {"pad_id": case["pad_token_id"], "left_pad": case["left_pad"], "truncation": case["truncation"]}
    if case.get("input_ids") is None:
        with pytest.raises(ValueError, match="9 tokens exceed max_length = 6"):
            fit_length(case["input"], case["max_length"], **options)
    else:
        ids, mask = fit_length(case["input"], case["max_length"], **options)
        assert (ids, mask) == (case["input_ids"], case["attention_mask"])


def test_middle_of_an_odd_limit_keeps_more_of_the_end():
    ids, mask = fit_length(range(9), 5, pad_id=99, left_pad=True, truncation="middle")
    assert (ids, mask) == ([0, 1, 6, 7, 8], [1] * 5)
    assert fit_length([], 2, pad_id=99, left_pad=False, truncation="left") == ([99, 99], [0, 0])


@pytest.mark.parametrize("case", GOLDEN["response_mask"], ids=lambda c: str(c["eos_token_id"]))
def test_published_response_masks(case):
    masks = [response_mask(row, case["eos_token_id"]) for row in case["response_ids"]]
    assert masks == case["response_mask"]


def test_refusals():
    with pytest.raises(ValueError, match="truncation 'top' is not known; allowed: right, left, middle, error"):
        fit_length([1], 3, pad_id=0, left_pad=True, truncation="top")
    with pytest.raises(ValueError, match="max_length = 0"):
        fit_length([1], 0, pad_id=0, left_pad=True, truncation="right")
