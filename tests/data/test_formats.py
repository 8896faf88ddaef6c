"""The tables of formats and files: complete, and asked for what each stage reads."""

from __future__ import annotations

from dataclasses import fields

import pytest

from prism_fast.config import STAGES, DataConfig
from prism_fast.data.formats import FORMATS, SOURCES, needed_sources


def test_every_file_of_the_configuration_has_a_row():
    files = [field.name for field in fields(DataConfig) if field.type == "str | None"]
    assert sorted(files) == sorted(SOURCES)
    assert {source.format for source in SOURCES.values()} == set(FORMATS)
    assert {stage for source in SOURCES.values() for stage in source.stages} == set(STAGES)


@pytest.mark.parametrize(
    ("stages", "given", "needed"),
    [
        (STAGES, (), {"sft": "sft", "sft_val": "sft", "align": "warmup", "rlvr": "rlvr_direct"}),
        (["sft_continued"], ("eval",), {"sft": "sft_continued", "eval": "eval"}),
        (["warmup"], ("pairs",), {"pairs": "warmup"}),
        (["warmup", "align"], ("pairs",), {"pairs": "warmup", "align": "align"}),
        (["align"], ("pairs",), {"align": "align"}),
        ([], (), {}),
    ],
)
def test_what_stages_read(stages, given, needed):
    assert needed_sources(stages, dict.fromkeys(given, "path")) == needed
