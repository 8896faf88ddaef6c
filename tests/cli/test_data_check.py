"""``prism-fast data check``: all problems at once, counts, exit codes, prompt lengths."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from prism_fast.data.samples import Task
from prism_fast.data.writers import write_tasks

GOOD = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]}
LONG = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "A cat."}]}
EMPTY = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": " "}]}
PAIR = {"prompt": "x", "teacher_caption": "a", "student_caption": "b", "teacher_cot": "c", "student_cot": "d"}


def write(path, records):
    path.write_text(json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return path


def test_good_files_are_counted(invoke, data_files, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "id": "other"}])
    code, shown = invoke("data", "check", *data_files.values(), pairs)
    assert code == 0
    assert [line.split(": ")[1] for line in shown.splitlines() if not line.startswith("  ")] == [
        "demonstrations, 3 good, 0 problem(s)",
        "demonstrations, 3 good, 0 problem(s)",
        "tasks, 4 good, 0 problem(s)",
        "tasks, 5 good, 0 problem(s)",
        "tasks, 5 good, 0 problem(s)",
        "pairs, 2 good, 0 problem(s)",
    ]


def test_all_problems_of_all_files_with_file_row_and_field(invoke, data_files, tmp_path):
    bad = write(tmp_path / "bad.json", [GOOD, EMPTY, {"text": "x"}, {**GOOD, "images": ["no.png"]}])
    gone = tmp_path / "gone.parquet"
    code, shown = invoke("data", "check", bad, data_files["sft"], gone)
    lines = shown.splitlines()
    assert code == 1 and len(lines) == 7
    assert lines[0] == f"{bad}: demonstrations, 1 good, 3 problem(s)"
    assert [f"row {n}" in line for n, line in zip((1, 2, 3), lines[1:4], strict=True)] == [True] * 3
    assert "messages[1]" in lines[1] and "images[0]" in lines[3]
    assert "0 problem(s)" in lines[4] and "gone.parquet: " in lines[5] and "does not exist" in lines[6]


def test_json(invoke_json, data_files, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [PAIR, {"prompt": "x"}])
    first, second = invoke_json("data", "check", bad, data_files["align"])
    assert (first["path"], first["form"], first["good"]) == (str(bad), "pairs", 1)
    assert len(first["problems"]) == 1 and "line 2" in first["problems"][0] and first["prompt_tokens"] is None
    assert second["problems"] == [] and second["good"] == 4


def test_a_format_can_be_forced(invoke, tmp_path):
    turned = write(tmp_path / "turned.jsonl", [{"note": "no clue"}, GOOD])
    code, shown = invoke("data", "check", turned)
    assert code == 1 and "unknown, 0 good, 1 problem(s)" in shown
    assert "line 1: no known format has these fields (note)" in shown
    code, shown = invoke("data", "check", turned, "--format", "demonstrations")
    assert code == 1 and "demonstrations, 1 good, 1 problem(s)" in shown
    code, shown = invoke("data", "check", turned, "--format", "tasks")
    assert code == 1 and "tasks, 0 good, 2 problem(s)" in shown and "are fields of demonstrations" in shown
    assert invoke("data", "check", turned, "--format", "other")[0] == 2


def test_rows_for_a_reward_function_of_your_own_are_accepted_by_name(invoke, tmp_path):
    write_tasks(tmp_path / "own.parquet", [Task("t0", GOOD["messages"][:1], [], "mm_gad_2", "2")])
    refused, shown = invoke("data", "check", tmp_path / "own.parquet")
    assert refused == 1 and "no reward is known for 'mm_gad_2'; is 'mm_gad' meant?" in shown
    assert "reward.functions" in shown
    assert invoke("data", "check", tmp_path / "own.parquet", "--data-source", "mm_gad_2")[0] == 0


def test_teacher_columns_where_they_are_needed(invoke, data_files):
    assert invoke("data", "check", data_files["align"], "--require-teacher")[0] == 0
    code, shown = invoke("data", "check", data_files["rlvr"], "--require-teacher")
    assert code == 1 and "teacher_response" in shown


def test_image_limit(invoke, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
    path = write(tmp_path / "a.json", [{"messages": turns, "images": ["a.png"]}])
    assert invoke("data", "check", path)[0] == 0
    code, shown = invoke("data", "check", path, "--max-image-pixels", 1199)
    assert code == 1 and "images[0]" in shown
    assert invoke("data", "check", path, "--max-image-pixels", 1200)[0] == 0


def test_prompt_lengths_as_the_policy_sees_them(invoke, invoke_json, processor, policy_folder, tmp_path):
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")  # 64 merged patches
    pictured = {"messages": [{"role": "user", "content": "<image>x"}, GOOD["messages"][1]], "images": ["a.png"]}
    path = write(tmp_path / "a.json", [GOOD, {**pictured, "id": "pictured"}, {**LONG, "id": "long"}])
    content = [{"type": "image"}, {"type": "text", "text": "x"}]
    expected = len(
        processor.encode_prompt([{"role": "user", "content": content}], [Image.new("RGB", (256, 256))]).input_ids
    )
    assert expected > 64
    (shown,) = invoke_json("data", "check", path, "--policy", policy_folder)
    assert shown["good"] == 3 and shown["prompt_tokens"]["max"] > expected
    (shown,) = invoke_json("data", "check", path, "--policy", policy_folder, "--max-prompt-tokens", expected)
    assert shown["good"] == 2 and len(shown["problems"]) == 1
    assert "sample long" in shown["problems"][0] and f"limit of {expected}" in shown["problems"][0]
    (shown,) = invoke_json("data", "check", path, "--policy", policy_folder, "--max-prompt-tokens", expected - 1)
    assert [f"sample {name}" in p for name, p in zip(("pictured", "long"), shown["problems"], strict=True)] == [
        True
    ] * 2
    code, text = invoke("data", "check", path, "--policy", policy_folder, "--max-prompt-tokens", expected)
    assert code == 1 and "tokens on average" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--max-prompt-tokens", "5"], "needs a processor"), (["--policy", "nowhere"], "nowhere does not exist")],
)
def test_wrong_options_are_one_message(command, data_files, options, words):
    code, message = command("data", "check", data_files["sft"], *options)
    assert code == 1 and words in message and "Traceback" not in message


def test_rows_with_one_problem_are_one_line(invoke, invoke_json, tmp_path):
    """A wrong key in every row, and one row with a problem of its own."""
    wrong = [{"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "text": f"It is {n}"}]}
             for n in range(500)]  # fmt: skip
    path = write(tmp_path / "wrong.json", [*wrong, {**GOOD, "images": ["no.png"]}, GOOD])
    code, shown = invoke("data", "check", path)
    head, alike, own = shown.splitlines()
    assert code == 1 and head.endswith("demonstrations, 1 good, 501 problem(s)")
    assert alike.startswith("  500 rows (row 0, row 1, row 2, …): field 'messages[1]")
    assert "row 500" in own and "no.png" in own
    (finding,) = invoke_json("data", "check", path)
    assert [kind["count"] for kind in finding["kinds"]] == [500, 1] and len(finding["problems"]) == 501
    assert finding["kinds"][0]["rows"] == [f"row {n}" for n in range(500)]


def test_percentiles_of_prompts_and_responses(invoke, invoke_json, processor, policy_folder, tmp_path):
    answers = [" ".join(["word"] * n) for n in range(1, 101)]
    turn = GOOD["messages"][0]
    rows = [
        {"id": str(n), "messages": [turn, {"role": "assistant", "content": text}]} for n, text in enumerate(answers)
    ]
    path = write(tmp_path / "a.json", rows)
    lengths = sorted(len(processor.encode_plain(text)) for text in answers)
    (found,) = invoke_json("data", "check", path, "--policy", policy_folder)
    expected = {f"p{share}": lengths[share - 1] for share in (50, 90, 99)}
    assert found["text_tokens"]["response"] == {"mean": sum(lengths) / 100, **expected, "max": lengths[-1]}
    assert found["prompt_tokens"]["p50"] == found["prompt_tokens"]["max"]
    shown = invoke("data", "check", path, "--policy", policy_folder)[1]
    assert f"response: {sum(lengths) / 100:.0f} tokens on average; {lengths[49]} (50 %), {lengths[89]} (90 %)" in shown


def test_what_cannot_be_encoded_is_a_problem(invoke, policy_folder, tmp_path):
    """The check encodes as training does: an image that no processor takes is found here, not after two updates."""
    Image.new("L", (900, 4)).save(tmp_path / "long.png")
    turns = [{"role": "user", "content": "<image>x"}, GOOD["messages"][1]]
    path = write(tmp_path / "a.json", [GOOD, {"id": "long", "messages": turns, "images": ["long.png"]}])
    for policy in ([], ["--policy", policy_folder]):
        code, shown = invoke("data", "check", path, *policy)
        assert code == 1 and "1 good, 1 problem(s)" in shown and "900 x 4" in shown and "row 1" in shown


def test_rows_that_can_earn_nothing_are_told(invoke, invoke_json, tmp_path):
    """A prompt that does not ask for the sections, and a ground truth that is no answer; neither is an error."""
    asked = [{"role": "user", "content": "How many? Answer in <caption>, <think> and <answer>."}]
    truths = ["2", "x" * 2000, "\\frac{1}{2}", "nan"]  # longer than reward.max_answer_chars; not a number
    tasks = [Task(f"t{n}", asked, [], "mm_gad", truth) for n, truth in enumerate(truths)]
    write_tasks(tmp_path / "a.parquet", [*tasks, Task("t9", GOOD["messages"][:1], [], "mm_gad", "3")])
    code, shown = invoke("data", "check", tmp_path / "a.parquet")
    assert code == 0 and "tasks, 5 good, 0 problem(s)" in shown
    assert "1 of 5 prompts (first: row 4) do not ask for <caption>, <think> and <answer>" in shown
    assert "2 rows (row 1, row 3) can earn no reward" in shown
    (found,) = invoke_json("data", "check", tmp_path / "a.parquet")
    assert len(found["notes"]) == 2 and found["problems"] == []


def test_columns_image_root_and_system_prompt_are_those_of_a_run(invoke, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "pictures/a.png")
    row = {"ask": "<image>How many?", "say": "3", "images": ["a.png"]}
    (tmp_path / "own.json").write_text(json.dumps([row]))
    options = ["--column", "problem=ask", "--column", "answer=say", "--image-root", tmp_path / "pictures"]
    code, shown = invoke("data", "check", tmp_path / "own.json", *options)
    assert code == 0 and "tasks, 1 good, 0 problem(s)" in shown
    assert "has no system turn" in shown or "system_prompt" in shown
    code, prompted = invoke("data", "check", tmp_path / "own.json", *options, "--system-prompt", "published")
    assert code == 0 and "system_prompt" not in prompted
    assert invoke("data", "check", tmp_path / "own.json", *options[:4])[0] == 1  # no such image beside the file
    page = tmp_path / "page.html"
    assert invoke("data", "preview", tmp_path / "own.json", *options, "--out", page)[0] == 0
    assert "How many?" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--column", "problem"], "is not OUR=THEIR"),
        (["--column", "ask=problem"], "the other way round"),
        (["--system-prompt", "gone.txt"], "names this file"),
    ],
)
def test_options_of_reading_that_cannot_be_meant_are_refused(invoke, data_files, options, message):
    code, shown = invoke("data", "check", data_files["align"], *options)
    assert code == 2 and message in " ".join(shown.split())
