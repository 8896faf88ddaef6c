"""The corpus of bad inputs: each is a clear error, a counted skip, or "not correct", within its time.

`tests/bad_inputs/` holds the inputs. A time limit is met only where the corpus says so; nothing else may need one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_fast.config import ConfigError, load_config
from prism_fast.data.check import check_file
from prism_fast.data.images import load_image
from prism_fast.data.parsing import Settings, Wanted
from prism_fast.data.problems import DataError, ImageError, Place
from prism_fast.data.readers import read_pairs, read_sharegpt, read_tasks
from prism_fast.data.samples import MAX_TRUTH_CHARS
from prism_fast.data.screen import screen
from prism_fast.rewards import AnswerChecker, Judged, known_sources
from tests.bad_inputs.answers import ANSWERS, GOOD, RESPONSES, SLOW_RELEASED
from tests.bad_inputs.configs import OVERRIDES, RECIPES
from tests.bad_inputs.images import IMAGES, MAX_PIXELS, encoded, tiff_circle
from tests.bad_inputs.rows import DEMO, DEMOS, PAIR, PAIRS, TASK, TASKS
from tests.rewards.cases import judged

CORPUS = {
    "demonstrations": DEMOS,
    "pairs": PAIRS,
    "tasks": TASKS,
    "images": IMAGES,
    "recipes": RECIPES,
    "overrides": OVERRIDES,
    "answers": ANSWERS,
    "responses": RESPONSES,
    "slow under released semantics": SLOW_RELEASED,
}
FAILED = ("timeout", "worker_died")
SECONDS = 30.0  # on the clock, for one input: far above what any needs, far below a hang


def test_the_corpus_is_large():
    assert sum(map(len, CORPUS.values())) >= 150
    assert len({repr(value) for inputs in CORPUS.values() for value in inputs.values()}) >= 150


@pytest.fixture(autouse=True)
def within_its_time():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


def refused(read, name: str, place: str, path: Path) -> None:
    """The middle row is an error that names its place; with a list of problems it alone is left out."""
    with pytest.raises(DataError) as caught:
        screen(read(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, {place}") and ("field '" in message or place == "line 2")
    assert len(message) < 1000 and message.isprintable()
    problems: list[DataError] = []
    found = screen(read(path, problems=problems), problems=problems)
    counts = found.counts()
    assert counts.pop("kept") == 2 and sum(counts.values()) == len(problems) == 1, (name, problems)
    assert str(problems[0]) == message


@pytest.mark.parametrize("name", DEMOS)
def test_demonstrations(name, tmp_path):
    path = tmp_path / "demos.jsonl"
    (tmp_path / "a.png").write_bytes(encoded_pixel())
    row = DEMOS[name]
    lines = [json.dumps({**DEMO, "id": "first"}), row if isinstance(row, str) else json.dumps(row), json.dumps(DEMO)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    refused(read_sharegpt, name, "line 2", path)
    assert len(check_file(path, format="demonstrations").problems) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, tmp_path):
    path = tmp_path / "pairs.jsonl"
    (tmp_path / "a.png").write_bytes(encoded_pixel())
    path.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, PAIRS[name], PAIR)), encoding="utf-8")
    refused(read_pairs, name, "line 2", path)
    assert len(check_file(path, format="pairs").problems) == 1


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name, tmp_path):
    path = tmp_path / "tasks.parquet"
    schema = pa.Table.from_pylist([typed_task()]).schema
    pq.write_table(pa.Table.from_pylist([TASK, TASKS[name], TASK], schema), path)
    sources = known_sources(judge=False)

    def read(path, **options):
        return read_tasks(path, require_teacher=True, known_sources=sources, **options)

    refused(read, name, "row 1", path)
    assert len(check_file(path, settings=Settings(Wanted(require_teacher=True, known_sources=sources))).problems) == 1


def typed_task() -> dict:
    """A task from which every column gets the type of the released files."""
    reward = {"ground_truth": "3", "style": "rule", "equivalent_answers": ["__EMPTY__"]}
    extra = {"index": 1, "question": "Which?", "uid": "u", "kind": "k"}
    return {**TASK, "images": [{"bytes": b"x", "path": "p"}], "reward_model": reward, "extra_info": extra}


def encoded_pixel() -> bytes:
    return encoded(Image.new("RGB", (4, 4)), "PNG")


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("inline", [True, False], ids=["bytes", "file"])
def test_images(name, inline, tmp_path):
    content = IMAGES[name]()
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(content if inline else path, Place(Path("rows.json"), "row 7"), "images[0]", MAX_PIXELS)
    assert str(caught.value).startswith("rows.json, row 7: field 'images[0]': ") and len(str(caught.value)) < 1000


def test_an_endless_chain_of_pages_ends():
    assert load_image(tiff_circle(), Place(Path("f")), "image", MAX_PIXELS).size == (4, 4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tmp_path):
    content, words = RECIPES[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert words in message and "mine.yaml" in message and "\n" not in message


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name):
    override, words = OVERRIDES[name]
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [override])
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=10) as checker:
        checker.score([judged("1+x", "x+1")])  # the start of the worker is not part of anybody's time
        yield checker


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name, checker):
    gold, answer = ANSWERS[name]
    (reward,) = checker.score([judged(answer, gold)])
    assert reward.accuracy == 0.0 and reward.decided_by not in FAILED, reward
    if len(answer) <= MAX_TRUTH_CHARS:  # as an accepted answer it does no harm either
        (reward,) = checker.score([judged("a word", "another", equivalents=(answer,))])
        assert reward.accuracy == 0.0 and reward.decided_by not in FAILED, reward
    else:
        with pytest.raises(ValueError, match=f"characters, more than {MAX_TRUTH_CHARS}"):
            checker.score([judged("a word", "another", equivalents=(answer,))])


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(name, checker):
    assert checker.score([Judged(GOOD, "17", "mm_gad")])[0].accuracy == 1.0
    (reward,) = checker.score([Judged(RESPONSES[name], "17", "mm_gad")])
    assert reward.accuracy == 0.0 and reward.decided_by not in FAILED


@pytest.fixture(scope="module")
def released():
    with AnswerChecker(semantics="released", timeout_s=0.5) as checker:
        yield checker


@pytest.mark.parametrize("name", SLOW_RELEASED)
def test_slow_under_released_semantics(name, released):
    """The one place where a limit is expected to be met: the reward says so, and the next answer is checked."""
    gold, answer = SLOW_RELEASED[name]
    slow, fine = released.score([judged(answer, gold), judged("1/2", "0.5")])
    assert (slow.accuracy, slow.decided_by) == (0.0, "timeout") and fine.accuracy == 1.0
