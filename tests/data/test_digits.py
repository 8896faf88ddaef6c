from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prism_fast.data import digits as digits_module
from prism_fast.data.digit_demonstrations import SYSTEM_PROMPT
from prism_fast.data.digit_images import TILE, DigitCollection
from prism_fast.data.digit_questions import KINDS
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.digits import DigitsFiles, check_digits, tokenizer_corpus, write_digits
from prism_fast.data.grammar import split_text
from prism_fast.data.readers import read_sharegpt, read_tasks
from prism_fast.data.samples import Demonstration
from prism_fast.models.tokenizer import train_tokenizer
from tests.data.answers import truth

SMALL = DigitsSpec(sft_images=12, sft_val_images=3, align_tasks=9, rlvr_tasks=10, eval_images=5, train_digits=40)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> DigitsFiles:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", DigitsSpec(), seed=3)


@pytest.fixture(scope="module")
def label_of_tile() -> dict[bytes, int]:
    """Pixels of every upscaled digit of the bundled collection → its label."""
    bundled = load_digits()
    tiles = {}
    for pixels, label in zip(bundled.images, bundled.target.tolist(), strict=True):
        grey = np.rint(pixels * 255 / 16).astype(np.uint8)
        tiles[Image.fromarray(grey).resize((TILE, TILE), Image.Resampling.BICUBIC).tobytes()] = label
    assert len(tiles) == len(np.unique(bundled.images.reshape(len(bundled.images), -1), axis=0))
    return tiles


@pytest.fixture(scope="module")
def shown(files) -> list[tuple[Demonstration, list[bytes]]]:
    """One SFT demonstration per image, with the image's tiles."""
    samples = read_sharegpt(files.sft)[::4]
    return [(sample, tiles_of(sample.images[0])) for sample in samples]


def tiles_of(image: Image.Image) -> list[bytes]:
    assert image.size == (3 * TILE, TILE)
    return [image.convert("L").crop((TILE * n, 0, TILE * (n + 1), TILE)).tobytes() for n in range(3)]


def test_sizes_and_kinds(files):
    assert len(read_sharegpt(files.sft)) == 10_000
    assert len(read_sharegpt(files.sft_val)) == 400
    assert len(list((files.sft.parent / "images").iterdir())) == 2600
    for path, count in ((files.align, 512), (files.rlvr, 1024)):
        kinds = Counter(task.kind for task in read_tasks(path, require_teacher=True))
        assert sum(kinds.values()) == count
        assert max(kinds.values()) - min(kinds.values()) <= 1 and set(kinds) == set(KINDS)


def test_no_digit_image_is_shared_between_train_validation_and_test(files, shown, label_of_tile):
    def pool(samples) -> set[bytes]:
        return {tile for sample in samples for image in sample.images for tile in tiles_of(image)}

    train = {tile for _, tiles in shown for tile in tiles}
    for path in (files.align, files.rlvr):
        train |= pool(read_tasks(path, require_teacher=True))
    val, test = pool(read_sharegpt(files.sft_val)), pool(read_tasks(files.eval, require_teacher=True))
    assert train <= set(label_of_tile) and val <= set(label_of_tile) and test <= set(label_of_tile)
    assert not train & val and not train & test and not val & test
    assert (len(train), len(test)) == (1074, 603)
    assert 117 <= len(val) <= 1797 - 1074 - 603


def test_every_test_digit_is_on_one_evaluation_image_which_gets_every_question(files):
    tasks = list(read_tasks(files.eval, require_teacher=True))
    assert len(tasks) == 1005
    kinds: dict[str, list] = {}
    images: dict[str, set] = {}
    for task in tasks:
        kinds.setdefault(task.cluster, []).append(task.kind)
        images.setdefault(task.cluster, set()).add(task.images[0].tobytes())
    assert all(sorted(asked) == sorted(KINDS) for asked in kinds.values())
    assert all(len(pictures) == 1 for pictures in images.values())
    by_cluster = {task.cluster: task.images[0] for task in tasks}
    assert max(Counter(tile for image in by_cluster.values() for tile in tiles_of(image)).values()) == 1


@pytest.mark.parametrize("part", ["align", "rlvr", "eval"])
def test_teacher_and_ground_truth_follow_from_the_pixels(files, label_of_tile, part):
    for task in read_tasks(getattr(files, part), require_teacher=True):
        digits = tuple(label_of_tile[tile] for tile in tiles_of(task.images[0]))
        assert task.ground_truth == truth(task.kind, digits)
        assert re.findall(r"\d", task.teacher_caption) == [str(digit) for digit in digits] == list(task.extra["digits"])
        split = split_text(task.teacher_response)
        assert (split.caption, split.reasoning) == (task.teacher_caption, task.teacher_cot)
        assert split.answer == task.ground_truth
        assert task.data_source == "mm_gad" and task.equivalent_answers == ()
        assert task.messages[0] == {"role": "system", "content": SYSTEM_PROMPT}
        assert task.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": task.question}]
        assert task.question in KINDS[task.kind].phrasings


def test_demonstrations_are_valid_and_as_noisy_as_asked(shown, label_of_tile):
    faulty, styles, confusions = [], Counter(), Counter()
    for sample, tiles in shown:
        digits = tuple(label_of_tile[tile] for tile in tiles)
        kind = sample.uid.rsplit("-", 1)[1]
        split = split_text(sample.response)
        assert split.valid
        read = tuple(int(digit) for digit in re.findall(r"\d", split.caption))
        styles[re.sub(r"\d", "#", split.caption)] += 1
        confusions.update((a, b) for a, b in zip(digits, read, strict=True) if a != b)
        faulty.append(read != digits or split.answer != truth(kind, digits))
    assert abs(np.mean(faulty) - 0.35) < 0.04  # 4 standard deviations of 2,500
    assert len(styles) == 5 and min(styles.values()) > 150
    assert {pair for pair, _ in confusions.most_common(4)} == {(3, 8), (4, 9), (1, 7), (5, 6)}


def test_train_digits_are_used_equally_often(shown):
    used = Counter(tile for _, tiles in shown for tile in tiles)
    assert max(used.values()) - min(used.values()) <= 1


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_other_seed_other_data(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_digits(tmp_path / name, SMALL, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a if name.endswith((".json", ".parquet")))
    assert json.loads(a["digits.json"])["spec"]["align_tasks"] == 9


def test_parts_do_not_disturb_each_other(tmp_path):
    write_digits(tmp_path / "a", SMALL, 5)
    write_digits(tmp_path / "b", DigitsSpec(**{**vars(SMALL), "sft_images": 5, "align_tasks": 3, "noise": 0.0}), 5)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a["eval.parquet"] == b["eval.parquet"] and a["rlvr.parquet"] == b["rlvr.parquet"]
    assert a["align.parquet"] != b["align.parquet"]


def test_existing_folder_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileExistsError, match="here exists already"):
        write_digits(tmp_path / "here", SMALL, 0)
    monkeypatch.setattr(digits_module, "write_tasks", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_digits(tmp_path / "new", SMALL, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 1.5}, "DigitsSpec.noise = 1.5: is a share between 0 and 1"),
        ({"align_tasks": 0}, "DigitsSpec.align_tasks = 0: must be at least 1"),
        ({"sft_questions": 8}, "DigitsSpec.sft_questions = 8: there are 5 kinds"),
    ],
)
def test_impossible_specs_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_digits(DigitsSpec(**change))
    with pytest.raises(ValueError, match=message):
        write_digits(tmp_path / "new", DigitsSpec(**change), 0)
    assert list(tmp_path.iterdir()) == []


def test_too_many_digits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1700 train and 603 test digits leave -506 of 1797 for validation"):
        write_digits(tmp_path / "x", DigitsSpec(train_digits=1700), 0)
    assert list(tmp_path.iterdir()) == []


def test_in_folder_finds_complete_datasets_only(files, tmp_path):
    assert DigitsFiles.in_folder(files.sft.parent) == files
    with pytest.raises(FileNotFoundError, match=r"sft.json is missing: .* is not a complete digits folder"):
        DigitsFiles.in_folder(tmp_path)


def test_collection_drops_exact_duplicates(monkeypatch):
    bundled = load_digits()
    bundled.images = np.concatenate([bundled.images[:30], bundled.images[10:40]])
    bundled.target = np.concatenate([bundled.target[:30], bundled.target[10:40]])
    monkeypatch.setattr("prism_fast.data.digit_images.load_digits", lambda: bundled)
    collection = DigitCollection()
    assert len(collection) == 40
    assert collection.labels == load_digits().target[:40].tolist()
    with pytest.raises(ValueError, match="pool of 2 digits cannot fill"):
        collection.strips(np.arange(2), 1, np.random.default_rng(0))


def test_responses_are_short_in_tokens_of_the_learned_vocabulary(files):
    texts = list(tokenizer_corpus(files))
    assert texts[:2] == ["system\n", SYSTEM_PROMPT]
    assert not any("<image>" in text for text in texts)
    assert any("Iris" in text for text in texts[-20:])
    assert texts == list(tokenizer_corpus(files))
    tokenizer = train_tokenizer(texts, 2048)
    tasks = read_tasks(files.eval, require_teacher=True)[::5]
    lengths = [len(tokenizer.encode(task.teacher_response)) for task in tasks]
    assert max(lengths) <= 64 and np.mean(lengths) < 50
    assert max(len(tokenizer.encode(sample.response)) for sample in read_sharegpt(files.sft)[::20]) <= 96
    prompts = [tokenizer.encode(task.question) for task in read_tasks(files.align, require_teacher=True)[::5]]
    assert max(map(len, prompts)) <= 24 and len(tokenizer.encode(SYSTEM_PROMPT)) <= 16
    assert len(tokenizer.encode("assistant\n")) == 2
