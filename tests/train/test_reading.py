"""Bad samples in a run's files: refused by place and field, or left out and counted; limits on expanded prompts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from prism_fast.config import Config, ConfigError, load_config
from prism_fast.data.check import check_file
from prism_fast.data.parsing import Settings, Wanted
from prism_fast.data.problems import DataError
from prism_fast.data.screen import screen
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.report.rundir import read_run
from prism_fast.rewards import known_sources
from prism_fast.track.metrics import reproducible
from prism_fast.train import pipeline
from prism_fast.train.pipeline import run_stages
from prism_fast.train.reading import DataReader, open_samples

PROMPT = [{"role": "user", "content": "<image>How many?"}]
TEACHER = {"teacher_caption": "c", "teacher_cot": "t", "teacher_response": "r"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.build(train_tokenizer(["How many? Three."] * 3, 400))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of every kind: six rows, of which 0 and 5 are good, 1 is malformed, 2 has a damaged image, 3 a missing
    one, 4 an image of 16 times the others' area."""
    folder = tmp_path_factory.mktemp("bad")
    for name, size in (("good", 64), ("large", 256)):
        Image.new("RGB", (size, size), (9, 9, 9)).save(folder / f"{name}.png")
    (folder / "damaged.png").write_bytes((folder / "good.png").read_bytes()[:60])
    images = ["good", "good", "damaged", "missing", "large", "good"]
    images = [f"{name}.png" for name in images]
    turns = [*PROMPT, {"role": "assistant", "content": "Three."}]
    demos = [{"messages": turns, "images": [name]} for name in images]
    demos[1] = {"messages": turns, "images": []}
    (folder / "sft.json").write_text(json.dumps(demos))
    task = {"prompt": PROMPT, "data_source": "mm_gad", "reward_model": {"ground_truth": "3"}, **TEACHER}
    rows = [{**task, "images": [{"bytes": None, "path": name}]} for name in images]
    rows[1]["data_source"] = "mm_gda"
    pq.write_table(pa.Table.from_pylist(rows), folder / "rlvr.parquet")
    rows[1] |= {"data_source": "mm_gad", "teacher_cot": None}
    pq.write_table(pa.Table.from_pylist(rows), folder / "align.parquet")
    spans = {"teacher_caption": "a", "student_caption": "b", "teacher_cot": "c", "student_cot": "d"}
    pairs = [{"prompt": "How many?", "image": name, "system": None, **spans} for name in images]
    del pairs[1]["student_cot"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    names = {"sft": "sft.json", "sft_val": "sft.json", "align": "align.parquet", "rlvr": "rlvr.parquet"}
    names |= {"eval": "rlvr.parquet", "pairs": "pairs.jsonl"}
    return {name: folder / file for name, file in names.items()}


class Metrics(list):
    def write(self, stage, step, values):
        self.append((stage, step, values))


def fake_run(*overrides: str, checkpoint: bool = False) -> SimpleNamespace:
    """The parts of a run that reading uses."""
    return SimpleNamespace(
        config=load_config("digits", ["data.source=files", *overrides]),
        fingerprints={},
        metrics=Metrics(),
        console=Console(file=StringIO(), width=1000),
        stop=SimpleNamespace(poll=lambda where: None),
        resume=SimpleNamespace(checkpoint_of=lambda stage: {} if checkpoint else None),
    )


LIMIT = 60  # between the prompts with the good image and the one with the large image
KINDS = ("sft", "sft_val", "align", "rlvr", "eval", "pairs")


@pytest.mark.parametrize("name", KINDS)
def test_skipping_counts_by_reason(name, files, processor):
    run = fake_run("data.on_bad_sample=skip", f"data.max_prompt_tokens={LIMIT}")
    samples = DataReader(run, "any").read(name, files[name], processor)
    assert [samples.place(i).row.split()[1] for i in range(2)] == (["1", "6"] if name == "pairs" else ["0", "5"])
    assert len(samples) == 2 and all(len(sample.images) == 1 for sample in samples)
    ((stage, step, values),) = run.metrics
    assert (stage, step, values["name"], values["before"]) == ("data", 0, name, "any")
    counts = {key: values[f"data/{key}"] for key in ("kept", "skipped_bad", "skipped_image", "skipped_long")}
    assert counts == {"kept": 2, "skipped_bad": 1, "skipped_image": 2, "skipped_long": 1}
    shown = run.console.file.getvalue()
    assert "2 kept, 1 skipped bad, 2 skipped image, 1 skipped long" in shown and str(files[name]) in shown


@pytest.mark.parametrize("name", KINDS)
def test_check_reports_what_a_run_leaves_out(name, files, processor):
    """The same problems, by the same code, without a run."""
    run = fake_run("data.on_bad_sample=skip", f"data.max_prompt_tokens={LIMIT}")
    found = DataReader(run, "any").screen(name, files[name], processor)
    wanted = Wanted(require_teacher=name == "align", known_sources=known_sources(judge=False))
    settings = Settings(wanted, max_image_pixels=2**24)
    checked = check_file(files[name], settings=settings, processor=processor, max_prompt_tokens=LIMIT)
    assert [str(problem) for problem in checked.problems] == [str(problem) for problem in found.problems]
    assert len(found.problems) == 4 and checked.samples == len(found.samples) == 2
    fields = {"sft": "messages", "align": "teacher_cot", "pairs": "student_cot"}
    field = fields.get(name.removesuffix("_val"), "data_source")
    row = "line 2" if name == "pairs" else "row 1"
    assert f"{files[name]}, {row}: field '{field}'" in str(found.problems[0])
    assert "field 'prompt': expands to" in str(found.problems[-1])


@pytest.mark.parametrize("name", KINDS)
def test_raising_names_file_row_and_field(name, files, processor):
    for overrides in ([], [f"data.max_prompt_tokens={LIMIT}"]):
        run = fake_run(*overrides)
        with pytest.raises(DataError) as caught:
            DataReader(run, "any").read(name, files[name], processor)
        row = "line 2" if name == "pairs" else "row 1"
        assert str(caught.value).startswith(f"{files[name]}, {row}: field '") and run.metrics == []


def test_long_prompts_alone(files, processor, tmp_path):
    """Image tokens count: the same text with a larger image is too long, by exactly the tokens of the image."""
    turns = [*PROMPT, {"role": "assistant", "content": "Three."}]
    path = files["sft"].parent / "two.json"
    path.write_text(json.dumps([{"messages": turns, "images": [f"{name}.png"]} for name in ("good", "large")]))
    small, large = screen(open_samples(Config(), "sft", path), processor=processor).prompt_tokens
    assert large - small == 64 - 4  # 256² and 64² pixels in merged patches of 32²
    kept = DataReader(fake_run(f"data.max_prompt_tokens={large}"), "sft").read("sft", path, processor)
    assert len(kept) == 2
    with pytest.raises(DataError, match=rf"row 1, sample two-1: .*expands to {large} tokens.* limit of {large - 1}"):
        DataReader(fake_run(f"data.max_prompt_tokens={large - 1}"), "sft").read("sft", path, processor)
    run = fake_run("data.on_bad_sample=skip", f"data.max_prompt_tokens={small - 1}")
    with pytest.raises(ConfigError, match=r"data.sft: no usable sample is left of .*two.json: 0 kept, 2 skipped long"):
        DataReader(run, "sft").read("sft", path, processor)


def test_nothing_is_screened_unless_asked_for(files, processor):
    good = files["sft"].parent / "late.json"
    turns = [*PROMPT, {"role": "assistant", "content": "Three."}]
    good.write_text(json.dumps([{"messages": turns, "images": [f"{name}.png"]} for name in ("good", "damaged")]))
    run = fake_run()
    samples = DataReader(run, "sft").read("sft", good, processor)
    assert len(samples) == 2 and run.metrics == []
    with pytest.raises(DataError, match="damaged.png"):
        samples[1]


def test_a_resumed_stage_writes_no_second_line(files, processor):
    run = fake_run("data.on_bad_sample=skip", checkpoint=True)
    assert len(DataReader(run, "rlvr").read("rlvr", files["rlvr"], processor)) == 3
    assert run.metrics == [] and run.console.file.getvalue() == ""


def test_a_missing_file_and_missing_columns_are_errors_in_either_mode(files, processor, tmp_path):
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "no.parquet")
    for mode in ("raise", "skip"):
        reader = DataReader(fake_run(f"data.on_bad_sample={mode}"), "align")
        for path in (tmp_path / "gone.parquet", tmp_path / "no.parquet"):
            with pytest.raises(DataError, match=path.name):
                reader.read("align", path, processor)


def test_a_run_with_bad_rows(small_data, files, tmp_path, monkeypatch):
    """SFT and its evaluation on files with bad rows: refused by default; with skip the counts stand in front."""
    settings = ["threads=1", "model.tiny.vocab_size=600", "model.tiny.num_layers=1", "sft.batch=2", "sft.max_updates=2"]
    settings += ["sft.eval_every=1", "stages=[sft]", "eval.max_new_tokens=2", *small_data]
    settings += [f"data.{name}={files[name]}" for name in ("sft", "sft_val", "eval")]
    console = Console(file=StringIO(), width=1000)
    with pytest.raises(DataError, match=r"sft.json, row 1: field 'messages'"):
        run_stages(load_config("digits", [*settings, f"out={tmp_path / 'raise'}"]), console)
    skip = ["data.on_bad_sample=skip", f"out={tmp_path / 'skip'}"]
    folder = run_stages(load_config("digits", [*settings, *skip]), console)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["data", "data", "sft", "sft", "data", "eval", "stage"]
    assert [
        (line["name"], line["data/kept"], line["data/skipped_image"]) for line in lines if line["stage"] == "data"
    ] == [
        ("sft", 3, 2),
        ("sft_val", 3, 2),
        ("eval", 3, 2),
    ]
    assert lines[5]["eval/items"] == 3
    notes = [problem for problem in read_run(folder).problems if "left out" in problem]
    assert len(notes) == 3 and "3 of 6 samples of data.sft were left out (1 bad, 2 image)." in notes
    assert list(read_run(folder).steps) == ["sft"]  # the counts are no stage
    assert {f"eval/{kind}" for kind in ("timeouts", "worker_deaths", "judge_errors")} <= lines[5].keys()

    crashed = load_config("digits", [*settings, skip[0], f"out={tmp_path / 'crashed'}", "checkpoint_every=1"])
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="power cut"):
        broken.setattr(pipeline, "evaluate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut")))
        run_stages(crashed, console)
    run_stages(crashed, console, resume=True)  # behind the last checkpoint: what was counted before it stands once
    again = [json.loads(line) for line in (tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()]
    untimed = [[reproducible(line) for line in run] for run in (lines, again)]
    assert untimed[0] == untimed[1]


def test_image_limits_of_a_run(small_data, tmp_path):
    """Images are resized as the processor does, the log says so, and the exported model keeps the limits."""
    settings = ["threads=1", "model.tiny.vocab_size=600", "model.tiny.num_layers=1", "sft.batch=2", "sft.max_updates=1"]
    settings += ["sft.eval_every=1", "stages=[sft]", "eval.max_new_tokens=2", "data.max_prompt_tokens=400"]
    longest, shown = {}, {}
    for name, limits in (("own", []), ("small", ["data.max_pixels=1024"])):
        console = Console(file=StringIO(), width=1000)
        config = load_config("digits", [*settings, *small_data, *limits, f"out={tmp_path / name}"])
        folder = run_stages(config, console)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        longest[name] = next(line["data/prompt_tokens_max"] for line in lines if line["stage"] == "data")
        shown[name] = "images are resized to between 1,024 and 1,024 pixels" in console.file.getvalue()
    assert longest["own"] - longest["small"] == 4 - 2  # 128 x 32 pixels become 64 x 32: no side is below a patch
    assert shown == {"own": False, "small": True}
    exported = Processor.from_pretrained(tmp_path / "small" / "export" / "sft")
    assert exported.image_area == (1024, 1024)
    assert Processor.from_pretrained(tmp_path / "own" / "export" / "sft").image_area == (1024, 512 * 512)


def test_contradicting_image_limits_are_refused():
    with pytest.raises(ConfigError, match=r"data.min_pixels must be at most data.max_pixels = 10, got 20"):
        load_config("digits", ["data.min_pixels=20", "data.max_pixels=10"])
