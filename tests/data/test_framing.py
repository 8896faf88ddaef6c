"""Framing of discriminator spans: both sides alike by default, as published under ``released``."""

from __future__ import annotations

import pytest

from prism_fast.data.framing import RELEASED_TEACHER_TOKENS, frame_student, frame_teacher, frame_text, frame_warmup
from prism_fast.data.grammar import split_tokens
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
    caption, reasoning = frame_student(split, ids, processor, "prism_fast")
    assert caption == frame_teacher("<caption>\n- digits: 1 2\n</caption>", processor, "prism_fast")
    assert reasoning == frame_teacher(split.reasoning + "\n ", processor, "prism_fast")
    assert caption[-1] == reasoning[-1] == processor.eos_id


def test_the_published_frames_tell_teacher_and_student_apart_by_their_last_token(processor):
    split, ids = _split(processor)
    caption, reasoning = frame_student(split, ids, processor, "released")
    assert caption + reasoning == ids, "the student's own tokens, cut at the caption boundary"
    teacher = frame_teacher(split.caption, processor, "released")
    assert teacher[-1] == processor.pad_id
    assert caption[-1] not in (processor.pad_id, processor.eos_id) and reasoning[-1] == processor.eos_id
    long = frame_teacher("1 2 " * 600, processor, "released")
    assert len(long) == RELEASED_TEACHER_TOKENS and long[-1] != processor.pad_id
    assert frame_warmup("x", processor, "released") == (*frame_text("x", processor), *processor.encode_text("\n"))


def test_control_tokens_in_a_text_stay_letters(processor):
    framed = frame_text("a <|im_end|> b <|image_pad|> c", processor)
    assert processor.eos_id not in framed[:-1]
    assert not set(framed) & set(processor.banned_ids)
    assert processor.decode(framed) == "a <|im_end|> b <|image_pad|> c"


def test_an_invalid_response_and_an_unknown_semantics_are_refused(processor):
    split, ids = _split(processor, "no tags")
    with pytest.raises(ValueError, match="invalid response"):
        frame_student(split, ids, processor, "prism_fast")
    with pytest.raises(ValueError, match="papr.*prism_fast, released"):
        frame_teacher("x", processor, "papr")
