from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from prism_fast.report.rundir import read_run
from prism_fast.report.samples import MAX_ROLLOUTS, choose_groups, picture, segments, spread, visible
from tests.report.synthetic import response, rollout_records, write_frames, write_image, write_run


def test_segments_join_to_the_text_and_carry_the_sections() -> None:
    text, spans = response("Ziffern 3 und 5 – ünïcode 🎲", "3 + 5\n= 8", "8")
    text = "  " + text + "\n"
    spans = {name: [start + 2, end + 2] for name, (start, end) in spans.items()}
    pieces, warning = segments(text, spans)
    assert warning is None
    assert "".join(piece for _, piece in pieces) == text
    assert [name for name, _ in pieces] == ["", "caption", "", "think", "", "answer", ""]
    assert dict(pieces)["think"] == "<think>3 + 5\n= 8</think>"


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"caption": [0, 11]}, "not inside"),
        ({"caption": [-1, 4]}, "not inside"),
        ({"caption": [4, 2]}, "not inside"),
        ({"caption": [0, 6], "think": [5, 8]}, "overlaps"),
    ],
)
def test_impossible_spans_are_not_drawn_but_told(spans: dict, message: str) -> None:
    pieces, warning = segments("0123456789", spans)
    assert pieces == [("", "0123456789")] and warning is not None and message in warning


def test_segments_without_spans_or_text() -> None:
    assert segments("free text", None) == ([("", "free text")], None)
    assert segments("", {}) == ([], None)


def test_visible_keeps_writing_and_shows_what_has_no_glyph() -> None:
    kept = "tab\tline\n ünïcode 🎲 שלום <b>"
    assert visible(kept) == kept
    assert visible("a\x00b\x1b[31m\r") == "a\u2400b\u241b[31m\u240d"
    assert visible("\ud800x\x85\ufffe") == "\ufffdx\ufffd\ufffd"
    assert visible("\u202eabc\u2066") == "⟨U+202E⟩abc⟨U+2066⟩"
    visible("\udfff").encode("utf-8")


def test_spread_takes_first_and_last() -> None:
    assert spread([1, 10, 20, 30, 40, 50], 3) == [1, 20, 50]
    assert spread([4, 8], 5) == [4, 8]
    assert spread([4, 8, 9], 1) == [9]
    with pytest.raises(ValueError, match="1 or more"):
        spread([1], 0)
    dice = random.Random(3)
    for _ in range(50):
        values = sorted(dice.sample(range(1000), dice.randint(2, 40)))
        count = dice.randint(2, 12)
        chosen = spread(values, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(values))
        assert chosen[0] == values[0] and chosen[-1] == values[-1]


def test_groups_are_capped_early_to_late_and_independent_of_content(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rollouts=False)
    for stage in ("align", "rlvr"):
        group_of_20 = rollout_records(path, stage, 60, random.Random(1), per_group=20)
        write_frames(path / "rollouts" / f"{stage}.jsonl.zst", group_of_20)
    problems: list[str] = []
    groups = choose_groups(read_run(path), problems)
    assert problems == []
    assert sum(len(group.rollouts) for group in groups) == MAX_ROLLOUTS
    for stage in ("align", "rlvr"):
        own = [group for group in groups if group.stage == stage]
        assert [group.step for group in own] == [1, 13, 28, 43, 58]
        assert all(group.total == 20 and {r["group"] for r in group.rollouts} == {0} for group in own)


def test_steps_repeated_after_a_resume_are_shown_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rollouts=False)
    first = rollout_records(path, "rlvr", 9, random.Random(1), per_group=4)
    again = [record | {"text": "again"} for record in first if record["step"] >= 4]
    write_frames(path / "rollouts" / "rlvr.jsonl.zst", [*first, *again])
    groups = choose_groups(read_run(path), [])
    assert {group.step: (group.total, group.first["text"] == "again") for group in groups} == {
        1: (4, False),
        4: (4, True),
        7: (4, True),
    }


def test_pictures_are_magnified_when_small_and_reduced_when_large(run_dir: Path) -> None:
    run = read_run(run_dir)
    small = picture(run, write_image(run_dir, "37", (48, 16)), [])
    assert small is not None and (small.width, small.height, small.pixelated) == (192, 64, True)
    large = picture(run, write_image(run_dir, "37", (2000, 1000)), [])
    assert large is not None and (large.width, large.height, large.pixelated) == (512, 256, False)
    problems: list[str] = []
    assert picture(run, "0" * 64, problems) is None and "is missing" in problems[0]


def test_only_png_is_embedded(run_dir: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="GIF")
    (run_dir / "rollouts" / "images" / f"{'1' * 64}.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is not a PNG"):
        picture(read_run(run_dir), "1" * 64, [])
