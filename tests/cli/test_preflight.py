"""What a run would stumble over, found by ``--dry-run`` and before its first stage without writing a file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import load_config
from prism_fast.data.problems import DataError
from prism_fast.data.samples import Task
from prism_fast.data.writers import write_tasks
from prism_fast.models.discriminator import HEAD_KEY, load_discriminator
from prism_fast.models.policy import load_policy
from prism_fast.preflight import check_space, disk_needs
from prism_fast.rewards import RewardFunctionError
from prism_fast.train.rollout_log import RolloutLogError


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch, policy_folder, discriminator_folder, data_files):
    """Every test of this file: the working folder and the inputs' folders are the same before and after."""
    monkeypatch.chdir(tmp_path)
    inputs = [policy_folder, discriminator_folder, data_files["sft"].parent]

    def listing() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for folder in inputs for p in folder.rglob("*"))

    before = listing()
    yield
    assert listing() == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


@pytest.fixture
def everything(policy_folder, discriminator_folder, data_files) -> list[str]:
    models = [f"model.policy={policy_folder}", f"model.discriminator={discriminator_folder}"]
    return [*models, "data.source=files", *(f"data.{name}={path}" for name, path in data_files.items())]


@pytest.fixture
def printed(tmp_path_factory):
    """The configuration that a dry run printed, loaded from a file outside the watched folders."""

    def load(shown: str):
        path = tmp_path_factory.mktemp("printed") / "config.yaml"
        path.write_text(shown.partition("  memory peaks")[0])
        return load_config(str(path))

    return load


@pytest.mark.parametrize("stage", ["run", "sft", "warmup", "align", "rlvr"])
def test_what_a_run_needs_is_shown(invoke, everything, printed, stage, data_files):
    code, shown = invoke(stage, "digits", "out=out", *everything, "--dry-run", env={"COLUMNS": "150"})
    assert code == 0
    resolved, rest = printed(shown), shown.partition("memory peaks")[2]
    assert resolved.out == "out" and resolved.data.align == str(data_files["align"])
    assert resolved.stages == (load_config("digits").stages if stage == "run" else [stage])
    assert all(name in rest for name in resolved.stages)
    counted = {"sft": 3, "align": 4, "rlvr": 5}
    for name, count in counted.items():
        used = stage in ("run", name) or (stage == "warmup" and name == "align")
        assert (f"data.{name}: {data_files[name]}, {count} samples" in rest) == used
    assert "policy: " in rest and "discriminator: " in rest and "nothing was written" in rest


def test_what_released_leaves_out_is_said(invoke, everything):
    shown = invoke("run", "digits", "out=out", "semantics=released", *everything, "--dry-run")[1]
    assert shown.count("semantics=released differs from the published code: ") == len(SEMANTICS["released"].differs) > 5
    assert "differs from" not in invoke("run", "digits", "out=out", *everything, "--dry-run")[1]


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_bad_row_of_the_last_stage_is_found_before_the_first(invoke, everything, data_files, tmp_path_factory, dry):
    bad = tmp_path_factory.mktemp("bad") / "rlvr.parquet"
    rows = pq.read_table(data_files["rlvr"]).to_pylist()
    rows[3]["reward_model"]["ground_truth"] = " "
    pq.write_table(pa.Table.from_pylist(rows), bad)
    with pytest.raises(DataError, match=r"rlvr.parquet, row 3: field 'reward_model.ground_truth'"):
        invoke("run", "digits", "out=out", *everything, f"data.rlvr={bad}", *dry)


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "run"])
def test_prompts_that_cannot_earn_a_reward_are_told_before_the_first_stage(
    invoke, everything, tmp_path_factory, monkeypatch, dry
):
    """verl's geometry3k prompts ask for a box; rows that an own function grades are nobody's business here."""
    folder = tmp_path_factory.mktemp("boxed")
    (folder / "preflight_box.py").write_text("def well(completions, **kwargs): return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(folder)
    asks = [{"role": "user", "content": "Answer in <caption>, <think> and <answer>: 1 + 1?"}]
    box = [{"role": "user", "content": "1 + 1? Put it within \\boxed{}."}]
    tasks = [Task("a", asks, [], "math-77k", "2"), Task("b", box, [], "math-77k", "2"), Task("c", box, [], "mine", "2")]
    write_tasks(folder / "rlvr.parquet", tasks)
    settings = [f"data.rlvr={folder / 'rlvr.parquet'}", "reward.functions={mine: 'preflight_box:well'}"]

    def stop(*arguments, **options):
        raise RuntimeError("the first stage")

    monkeypatch.setattr("prism_fast.train.pipeline.run_stages", stop)
    if dry:
        shown = invoke("rlvr", "digits", "out=out", *everything, *settings, *dry)[1]
    else:
        told: list[str] = []
        monkeypatch.setattr("prism_fast.cli.console.print", lambda text, **style: told.append(f"{text}"))
        with pytest.raises(RuntimeError, match="the first stage"):
            invoke("rlvr", "digits", "out=out", *everything, *settings)
        shown = "\n".join(told)
    wanted = "warning: data.rlvr: 1 of 2 prompts (first: row 1) do not ask for <caption>, <think> and <answer>"
    assert wanted in shown and "data.system_prompt=published asks for it" in shown
    assert "data.align: " not in shown.partition("warning")[2]


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("none", r"reward.functions.mine \(preflight_own:none\) must give a list .* got a NoneType"),
        ("nowhere", "preflight_own .* has no 'nowhere'"),
    ],
)
def test_a_reward_function_is_tried_before_the_first_stage(
    invoke, everything, tmp_path_factory, monkeypatch, dry, function, said
):
    """Also where its rows come last in their file."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "preflight_own.py").write_text("def none(responses): pass\ndef well(responses): return []\n")
    monkeypatch.syspath_prepend(folder)
    prompt = [{"role": "user", "content": "1 + 1?"}]
    write_tasks(folder / "rlvr.parquet", [Task(f"t{i}", prompt, [], ("math-77k", "mine")[i], "2") for i in range(2)])
    settings = [f"data.rlvr={folder / 'rlvr.parquet'}", f"reward.functions={{mine: 'preflight_own:{function}'}}"]
    with pytest.raises(RewardFunctionError, match=said):
        invoke("rlvr", "digits", "out=out", *everything, *settings, *dry)


def test_a_replay_that_cannot_work_is_refused(invoke, everything):
    with pytest.raises(RolloutLogError, match="no-such-run is not a run directory"):
        invoke("run", "digits", "out=out", "replay=no-such-run", *everything, "--dry-run")


def test_room_on_the_disk_is_looked_for_before_a_run_and_in_a_dry_run(command, everything, monkeypatch):
    config = load_config("digits", everything)
    policy = load_policy(config.model.policy)
    discriminator = load_discriminator(config.model.discriminator)
    weights, scores = (sum(p.nbytes for p in model.parameters()) for model in (policy, discriminator))
    needs = disk_needs(config)
    assert needs["exports"] == 5 * weights + 2 * scores
    steps = 4 * (len(list(policy.parameters())) + len(list(discriminator.parameters())))
    assert needs["3 checkpoints"] == 3 * (3 * weights + 3 * scores + steps), "alignment trains both"
    total = sum(needs.values())
    assert "needs" not in check_space(config)
    for free, well in ((total, True), (total - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(1 << 50, 0, free))
        if well:
            assert "free" in check_space(config)
            continue
        for dry in ([], ["--dry-run"]):
            code, message = command("run", "digits", "out=out", *everything, *dry)
            assert code == 1 and "the run needs" in message and "keep_checkpoints" in message and "out" in message


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_folder_that_cannot_be_written_is_found(command, everything, tmp_path_factory, monkeypatch, dry):
    place = tmp_path_factory.mktemp("place")
    (place / "file").write_text("")
    code, message = command("run", "digits", f"out={place / 'file' / 'x'}", *everything, *dry)
    assert code == 1 and f"{place / 'file'} is not a folder" in message and "out=PATH" in message
    locked = place / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # as root; what a read-only mount answers to anybody
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and real(path, mode))
    code, message = command("run", "digits", f"out={locked / 'new' / 'x'}", *everything, *dry)
    assert code == 1 and f"{locked} is read-only" in message and "out=PATH" in message
    assert not list(locked.iterdir())


def test_responses_longer_than_the_policy_knows_are_refused(command, everything):
    for key in ("align.rollout", "rlvr.rollout", "warmup"):
        for tokens, well in ((4095, True), (4096, False)):
            setting = f"{key}.max_new_tokens={tokens}"
            code, message = command("run", "digits", "out=out", *everything, setting, "--dry-run")
            told = f"{setting} after a prompt of 1 tokens of text or more: longer than the 4,096 positions of "
            assert (code, told in message) == ((0, False) if well else (1, True)), message


def test_a_name_on_the_hub_is_told_how_to_get_it(command, everything):
    name = "Qwen/Qwen3-VL-4B-Instruct"
    for line in (["rlvr", "digits", "--dry-run"], ["plan", "rlvr_grpo"], ["eval", "digits", "out=out"]):
        code, message = command(line[0], line[1], *everything, *line[2:], f"model.policy={name}")
        assert code == 1 and f"hf download {name} --local-dir Qwen3-VL-4B-Instruct" in message, message
    (runs := Path("runs")).mkdir()
    for path in ("runs/gone", "gone", "a/b/c"):
        code, message = command("plan", "rlvr_grpo", f"model.policy={path}")
        assert code == 1 and "does not exist" in message and "hf download" not in message
    runs.rmdir()


def test_the_shipped_recipe_is_ready(invoke):
    code, shown = invoke("run", "digits", "--dry-run")
    assert code == 0 and "the built-in digits" in shown and "a new one under runs" in shown


def test_a_resolved_configuration_is_what_a_run_would_save(invoke, everything, printed):
    code, shown = invoke("rlvr", "digits", "rlvr.steps=7", *everything, "--dry-run")
    assert code == 0 and printed(shown) == load_config("digits", ["rlvr.steps=7", "stages=[rlvr]", *everything])


def test_errors_are_those_a_run_would_meet(command, everything, policy_folder, discriminator_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"messages": [{"role": "user", "content": "x"}]}]))
    headless, cut, bare = tmp_path / "headless", tmp_path / "cut", tmp_path / "bare"
    for folder, source in ((headless, discriminator_folder), (cut, policy_folder), (bare, policy_folder)):
        shutil.copytree(source, folder)
    state = load_file(headless / "model.safetensors")
    del state[HEAD_KEY]
    save_file(state, headless / "model.safetensors")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-10])
    (bare / "tokenizer_config.json").unlink()
    cases = [
        (["run", "data.sft=null"], "data.sft"),
        (["run", "data.align=gone.parquet"], "data.align: gone.parquet does not exist"),
        (["run", "data.eval=gone.parquet"], "data.eval: gone.parquet does not exist"),
        (["warmup", "data.pairs=gone.jsonl"], "data.pairs: gone.jsonl does not exist"),
        (["sft", f"data.sft={bad}"], "bad.json, row 0"),
        (["align", "model.policy=tiny"], "stage align needs a trained policy"),
        (["align", "model.discriminator=upcycle"], "stage align needs a warm discriminator"),
        (["rlvr", "model.policy=gone"], "model.policy"),
        (["rlvr", f"model.policy={discriminator_folder}"], "a policy must be 'qwen3_vl'"),
        (["rlvr", f"model.policy={cut}"], "damaged"),
        (["rlvr", f"model.policy={bare}"], "tokenizer_config.json is missing"),
        (["align", f"model.discriminator={headless}"], f"has no {HEAD_KEY}"),
        (["run", "out=full"], "full is not empty"),
        (["run", "device=cuda:99"], "cuda:99"),
        (["run", "device=cpu", "model.fused_trunk=liger"], "model.fused_trunk=liger: Liger's kernels run on CUDA"),
        (["run", "device=cpu", "model.attention=fa3"], "model.attention=fa3: it runs on CUDA, these models on cpu"),
        (["run", "stages=[]"], "stages is empty"),
        (["run", "data.source=digits", "data.digits.train_digits=1700"], "1700 train and 603 test digits leave"),
        (["run", "data.source=digits", "data.digits.sft_questions=9"], "there are 5 kinds of question"),
        (["sft", "model.policy=tiny", "model.tiny.vocab_size=20"], "vocab_size must be at least"),
    ]
    for (stage, *overrides), words in cases:
        code, message = command(stage, "digits", *everything, *overrides, "--dry-run")
        assert code == 1 and words in message and "Traceback" not in message, (stage, overrides, message)


def test_teacher_columns_are_asked_of_alignment_alone(command, everything, data_files):
    code, message = command("align", "digits", *everything, f"data.align={data_files['rlvr']}", "--dry-run")
    assert code == 1 and "teacher_response" in message
