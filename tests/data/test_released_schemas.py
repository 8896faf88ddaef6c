"""Files in the schemas that the released data sets are documented to have, written here and read, screened and graded.

The released files themselves have not been read yet: their exact columns are known from descriptions only.
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.data.check import check_file
from prism_fast.data.parsing import Settings, Wanted
from prism_fast.data.readers import PUBLISHED_SYSTEM_PROMPT, read_pairs, read_sharegpt, read_tasks
from prism_fast.data.screen import screen
from prism_fast.data.writers import encode_png
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rewards import AnswerChecker, Judged, known_sources

CAPTION = "<caption>\n- two squares\n</caption>"
COT = "<think>\nOne and one.\n</think>\n<answer>\n2\n</answer>"
RESPONSE = f"{CAPTION}\n{COT}"
QUESTION = "<image>How many squares are there?"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.build(train_tokenizer([RESPONSE, QUESTION] * 3, 500))


def png(value: int = 9) -> bytes:
    return encode_png(Image.new("RGB", (64, 64), (value, 0, 0)))


def graded(tasks) -> list[float]:
    with AnswerChecker() as checker:
        judged = [Judged(RESPONSE, t.ground_truth, t.data_source, t.equivalent_answers) for t in tasks]
        return [reward.accuracy for reward in checker.score(judged)]


def test_demonstrations(tmp_path, processor):
    """Caption, reasoning and answer in ShareGPT form, with human and gpt turns; image paths beside the file."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png())
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": RESPONSE}]
    rows = [
        {"conversations": turns, "images": ["images/0.png"]},
        {"conversations": turns, "images": ["images/0.png"], "system": PUBLISHED_SYSTEM_PROMPT, "id": "named"},
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": RESPONSE}], "images": []},
    ]
    (tmp_path / "demos.json").write_text(json.dumps(rows, ensure_ascii=False))
    found = screen(read_sharegpt(tmp_path / "demos.json"), processor=processor)
    assert found.counts()["kept"] == 3 and [sample.response for sample in found.samples] == [RESPONSE] * 3
    assert found.prompt_tokens[1] > found.prompt_tokens[0] and found.samples[1].messages[0]["role"] == "system"


def alignment_rows() -> list[dict]:
    """One row per image form and per way of saying that there is no equivalent answer."""
    base = {
        "data_source": "mm_gad",
        "prompt": [
            {"role": "system", "content": PUBLISHED_SYSTEM_PROMPT},
            {"role": "user", "content": QUESTION},
        ],
        "images": [{"bytes": png(), "path": None}],
        "teacher_response": RESPONSE,
        "teacher_caption": CAPTION,
        "teacher_cot": COT,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2", "equivalent_answers": ["__EMPTY__"]},
        "extra_info": {"index": 0, "split": "train", "answer": "2", "question": "How many squares are there?"},
    }
    named = {"images": [{"bytes": png(), "path": "squares.png"}], "extra_info": {**base["extra_info"], "index": 1}}
    nothing = {"style": "rule", "ground_truth": "a pair", "equivalent_answers": None}
    some = {"style": "rule", "ground_truth": "a pair", "equivalent_answers": ["2", "__EMPTY__"]}
    return [base, {**base, **named}, {**base, "reward_model": nothing}, {**base, "reward_model": some}]


@pytest.mark.parametrize("metadata", [False, True], ids=["plain", "with the metadata of an image feature"])
def test_alignment_tasks(tmp_path, metadata, processor):
    path = tmp_path / "rl_training_data.parquet"
    table = pa.Table.from_pylist(alignment_rows())
    if metadata:
        feature = {"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "Sequence"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    pq.write_table(table, path, row_group_size=3)
    tasks = read_tasks(path, require_teacher=True, known_sources=known_sources(judge=False))
    assert [task.equivalent_answers for task in tasks] == [(), (), (), ("2", "__EMPTY__")]
    assert graded(tasks) == [1.0, 1.0, 0.0, 1.0]
    first = tasks[0]
    assert (first.teacher_caption, first.teacher_cot, first.teacher_response) == (CAPTION, COT, RESPONSE)
    assert first.question == "How many squares are there?" and first.extra["split"] == "train"
    assert [part["type"] for part in first.messages[1]["content"]] == ["image", "text"]
    assert screen(tasks, processor=processor, max_prompt_tokens=400).counts()["kept"] == 4
    assert check_file(path, settings=Settings(Wanted(require_teacher=True))).problems == []


def test_released_rules_discard_equivalents_beside_the_placeholder(tmp_path):
    rows = alignment_rows()[-1:]
    rows[0]["data_source"] = "math-77k"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (task,) = read_tasks(tmp_path / "a.parquet", require_teacher=False)
    verdicts = []
    for semantics in ("released", "prism_fast"):
        with AnswerChecker(semantics=semantics, timeout_s=20) as checker:
            response = Judged(RESPONSE, task.ground_truth, task.data_source, task.equivalent_answers)
            verdicts.append(checker.score([response])[0].accuracy)
    assert verdicts == [0.0, 1.0]


@pytest.mark.parametrize("source", ["mm_gad", "math-77k", "visual_logic-26k", "hiyouga/geometry3k"])
def test_rlvr_and_validation_tasks(tmp_path, source):
    """No teacher columns; images as structs, and paths as other tools write them; nulls where nothing is known."""
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": QUESTION}],
        "images": [{"bytes": png(), "path": None}],
        "ability": None,
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": None,
    }
    text_only = {**row, "prompt": [{"role": "user", "content": "1 + 1?"}], "images": None}
    pq.write_table(pa.Table.from_pylist([row, text_only]), tmp_path / "rlvr.parquet")
    tasks = read_tasks(tmp_path / "rlvr.parquet", require_teacher=False, known_sources=known_sources(judge=False))
    assert [len(task.images) for task in tasks] == [1, 0] and graded(tasks) == [1.0, 1.0]
    (problem,) = check_file(tmp_path / "rlvr.parquet", settings=Settings(Wanted(require_teacher=True))).problems
    assert "field 'teacher_response': the column is missing" in str(problem)


def test_pairs(tmp_path, processor):
    """`prompt` or `question`, one image path or none; spans, whole responses, or both."""
    (tmp_path / "0.png").write_bytes(png())
    spans = {"teacher_caption": CAPTION, "student_caption": "c", "teacher_cot": COT, "student_cot": "t"}
    whole = {"teacher_response": RESPONSE, "student_response": "s"}
    lines = [
        {"prompt": "How many?", "image": "0.png", **spans},
        {"question": "How many?", "image": None, **spans, **whole},
        {"prompt": "How many?", "image": "0.png", **whole},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = screen(read_pairs(tmp_path / "pairs.jsonl"), processor=processor)
    assert [len(pair.images) for pair in found.samples] == [1, 0, 1]
    assert [pair.teacher_caption for pair in found.samples] == [CAPTION, CAPTION, None]
    assert [pair.student_response for pair in found.samples] == [None, "s", "s"]
    assert found.samples[0].messages[0] == {"role": "system", "content": PUBLISHED_SYSTEM_PROMPT}
    problems: list = []
    required = read_pairs(tmp_path / "pairs.jsonl", require=("student_cot",), problems=problems)
    assert len(required) == 2 and "line 3: field 'student_cot': is missing" in str(problems[0])


@pytest.mark.parametrize("size", [(64, 64), (33, 97), (300, 40), (1, 1), (2000, 1500), (40, 7000)])
def test_prompts_are_measured_as_they_are_encoded(size, processor):
    image = Image.new("RGB", size)
    for count in (0, 1, 3):
        messages = [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": "How many?"}]}]
        encoded = processor.encode_prompt(messages, [image] * count)
        assert processor.prompt_tokens(messages, [image] * count) == len(encoded.input_ids)
    with pytest.raises(ValueError, match="1 image placeholder"):
        processor.prompt_tokens([{"role": "user", "content": [{"type": "image"}]}], [])
