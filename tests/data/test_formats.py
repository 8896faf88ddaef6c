"""The tables of formats and data keys: complete, without overlap, and asked for what each stage reads."""

from __future__ import annotations

from dataclasses import fields

import pytest

from prism_fast.config import STAGES, DataConfig
from prism_fast.data.entries import COLUMNS
from prism_fast.data.formats import FORMATS, ROLES, SOURCES, needed_sources


def test_every_key_of_the_configuration_has_a_row():
    keys = [field.name for field in fields(DataConfig) if field.type == "Any"]
    assert sorted(keys) == sorted(SOURCES)
    assert {source.role for source in SOURCES.values()} == {format.role for format in FORMATS.values()} == set(ROLES)
    assert {stage for source in SOURCES.values() for stage in source.stages} == set(STAGES)


def test_fields_that_identify_a_format_can_be_named_by_the_recipe():
    keys = {key for format in FORMATS.values() for group in format.keys for key in group}
    assert keys <= set(COLUMNS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_fields_of_a_format_are_no_other_role(name):
    record = [group[0] for group in FORMATS[name].keys]
    assert {format.role for format in FORMATS.values() if format.matches(record)} == {FORMATS[name].role}


@pytest.mark.parametrize(
    ("stages", "given", "needed"),
    [
        (STAGES, (), {"sft": "sft", "align": "warmup", "rlvr": "rlvr_direct"}),
        (["sft"], ("sft_val",), {"sft": "sft", "sft_val": "sft"}),
        (["sft_continued"], ("eval", "sft_val"), {"sft": "sft_continued", "eval": "eval"}),
        (["warmup"], ("pairs",), {"pairs": "warmup"}),
        (["warmup", "align"], ("pairs",), {"pairs": "warmup", "align": "align"}),
        (["align"], ("pairs",), {"align": "align"}),
        ([], (), {}),
    ],
)
def test_what_stages_read(stages, given, needed):
    assert needed_sources(stages, dict.fromkeys(given, "path")) == needed
