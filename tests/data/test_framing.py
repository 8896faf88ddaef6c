"""Framing of discriminator spans: both sides alike by default."""

from __future__ import annotations

import pytest

from prism_fast.data.framing import (
    SPANS,
    frame_student,
    frame_teacher,
    frame_text,
    frame_warmup,
    side_texts,
)
from prism_fast.data.grammar import split_tokens
from prism_fast.data.samples import Pair
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer

RESPONSE = "<caption>\n- digits: 1 2\n</caption>\n<think>\n1+2=3\n</think>\n<answer>\n3\n</answer>"


@pytest.fixture(scope="module")
def processor():
    return Processor.build(train_tokenizer([RESPONSE] * 20, 400))


def _split(processor, text=RESPONSE):
    ids = (*processor.encode_text(text), processor.eos_id)
    return split_tokens(ids, processor.tokenizer), ids


def test_equal_texts_are_equal_token_sequences(processor):
    split, ids = _split(processor)
    caption, reasoning = (frame_student(span, split, ids, processor, "prism_fast") for span in SPANS["spans"])
    assert caption == frame_teacher("caption", "<caption>\n- digits: 1 2\n</caption>", processor, "prism_fast")
    assert reasoning == frame_teacher("reasoning", split.reasoning + "\n ", processor, "prism_fast")
    (whole,) = (frame_student(span, split, ids, processor, "prism_fast") for span in SPANS["response"])
    assert whole == frame_teacher("response", RESPONSE + "\n", processor, "prism_fast")
    assert whole == frame_warmup("response", RESPONSE, processor, "prism_fast")
    assert caption[-1] == reasoning[-1] == processor.eos_id


@pytest.mark.parametrize("semantics", ["prism_fast", "paper", "released"])
def test_a_response_may_end_with_the_end_of_text(processor, semantics):
    """Every end token of the policy ends a response; it is no part of the text; `released` reads a score there."""
    split, ids = _split(processor)
    other = (*ids[:-1], processor.pad_id)
    assert split_tokens(other, processor.tokenizer) == split and processor.decode(other) == RESPONSE
    caption, reasoning = (frame_student(span, split, other, processor, semantics) for span in SPANS["spans"])
    assert caption == frame_student("caption", split, ids, processor, semantics)
    turn_end = frame_student("reasoning", split, ids, processor, semantics)
    assert turn_end[-1] == processor.eos_id
    assert reasoning == ((*turn_end[:-1], processor.pad_id) if semantics == "released" else turn_end)


def test_control_tokens_in_a_text_stay_letters(processor):
    framed = frame_text("a <|im_end|> b <|image_pad|> c", processor)
    assert processor.eos_id not in framed[:-1]
    assert not set(framed) & set(processor.banned_ids)
    assert processor.decode(framed) == "a <|im_end|> b <|image_pad|> c"


def test_an_invalid_response_and_an_unknown_semantics_are_refused(processor):
    split, ids = _split(processor, "no tags")
    with pytest.raises(ValueError, match="invalid response"):
        frame_student("caption", split, ids, processor, "prism_fast")
    with pytest.raises(ValueError, match="papr.*released, paper, prism_fast"):
        frame_teacher("caption", "x", processor, "papr")
    with pytest.raises(ValueError, match="span 'cot' is not known; allowed: caption, reasoning, response"):
        frame_warmup("cot", "x", processor, "prism_fast")
    with pytest.raises(ValueError, match="'released' has no whole-response mode"):
        frame_teacher("response", "x", processor, "released")


def test_on_paper_the_trace_is_scored_without_the_answer(processor):
    split, ids = _split(processor)
    trace = frame_text("<think>\n1+2=3\n</think>", processor)
    assert frame_student("reasoning", split, ids, processor, "paper") == trace
    for text in (split.reasoning, "<think>\n1+2=3\n</think>"):  # a teacher's text may hold the trace alone
        assert frame_teacher("reasoning", text, processor, "paper") == trace
        assert frame_warmup("reasoning", text, processor, "paper") == trace
    assert frame_student("caption", split, ids, processor, "paper") == frame_text(split.caption, processor)
    assert frame_student("response", split, ids, processor, "paper") == frame_text(RESPONSE, processor)


def test_texts_that_a_sample_lacks_are_named():
    pair = Pair("p7", [], [], "a", "b", "c", "d")
    assert side_texts(pair, "student", SPANS["spans"]) == ("b", "d")
    with pytest.raises(ValueError, match=r"'p7' has no teacher_response: align.discriminate=response scores whole"):
        side_texts(pair, "teacher", SPANS["response"])
    with pytest.raises(ValueError, match="no student_caption and no student_cot"):
        side_texts(Pair("p8", [], [], teacher_response="a", student_response="b"), "student", SPANS["spans"])
