"""The published frames."""

from __future__ import annotations

from prism_fast.data.framing import SPANS, frame_student, frame_teacher, frame_text, frame_warmup
from prism_fast.data.grammar import split_tokens
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.released.frames import TEACHER_TOKENS

RESPONSE = "<caption>\n- digits: 1 2\n</caption>\n<think>\n1+2=3\n</think>\n<answer>\n3\n</answer>"


def test_the_published_frames_tell_teacher_and_student_apart_by_their_last_token():
    processor = Processor.build(train_tokenizer([RESPONSE] * 20, 400))
    ids = (*processor.encode_text(RESPONSE), processor.eos_id)
    split = split_tokens(ids, processor.tokenizer)
    caption, reasoning = (frame_student(span, split, ids, processor, "released") for span in SPANS["spans"])
    assert caption + reasoning == ids, "the student's own tokens, cut at the caption boundary"
    teacher = frame_teacher("caption", split.caption, processor, "released")
    assert teacher[-1] == processor.pad_id
    assert caption[-1] not in (processor.pad_id, processor.eos_id) and reasoning[-1] == processor.eos_id
    long = frame_teacher("caption", "1 2 " * 600, processor, "released")
    assert len(long) == TEACHER_TOKENS and long[-1] != processor.pad_id
    framed = frame_warmup("caption", "x", processor, "released")
    assert framed == (*frame_text("x", processor), *processor.encode_text("\n"))
