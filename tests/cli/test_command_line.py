"""Version, suggestions, completion, and which errors become one message."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prism_fast
from prism_fast import cli, commands
from prism_fast.config import Config, ConfigError, dump_config, load_config, shipped_recipes
from prism_fast.track.jsonl import RecordError
from prism_fast.train import pipeline
from prism_fast.train.checkpoint import CheckpointError
from prism_fast.train.signals import Stopped

ROOT = Path(prism_fast.__file__).resolve().parents[1]


def test_version(invoke):
    assert invoke("--version") == (0, f"prism-fast {prism_fast.__version__}\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["aling"], "align"),
        (["docter"], "doctor"),
        (["convert", "upcylce"], "upcycle"),
        (["data", "chek"], "check"),
        (["train", "digits"], "run"),
        (["evaluate", "digits"], "eval"),
    ],
)
def test_an_unknown_command_names_the_nearest(invoke, typed, meant):
    code, shown = invoke(*typed)
    assert code == 2 and f"Did you mean '{meant}'" in shown


def test_an_unknown_recipe_names_the_nearest(command):
    code, message = command("plan", "digts")
    assert code == 1 and "Did you mean 'digits'" in message


# What takes seconds to import. A mistyped key needs none of it to be told.
HEAVY = ("torch", "transformers", "numpy", "scipy", "pyarrow", "sklearn", "sympy", "plotly", "PIL", "datasets")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("run digits nosuchkey=1", 1, "Key 'nosuchkey' not in 'Config'"),
        ("align digits align.stepz=3", 1, "align.stepz"),
        ("run digits sft.batch=0", 1, "sft.batch must be 1 or more, got 0"),
        ("run digts", 1, "Did you mean 'digits'"),
        ("resume no-such-run", 1, "no-such-run does not exist"),
        ("train digits", 2, "Did you mean 'run'"),
        ("--help", 0, "OVERRIDES"),
        ("run --help", 0, "--dry-run"),
        ("--version", 0, "prism-fast"),
    ],
)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(tmp_path, line, code, words):
    """In a process of its own, through the installed entry point."""
    program = (
        "import sys\n"
        "from prism_fast.entry import main\n"
        f"sys.argv = ['prism-fast', *{line.split()!r}]\n"
        "try: main()\n"
        f"finally: print('imported:', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr, done
    assert done.stdout.splitlines()[-1] == "imported:", done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["align.weights=0.5,0.5"], "it takes a list: 'align.weights=[0.5,0.5]'"),
        (["stages=sft,rlvr"], "it takes a list: 'stages=[sft,rlvr]'"),
        (["sft.optimizer.betas=0.9"], "it takes a list: 'sft.optimizer.betas=[0.9]'"),
        (["model.dtype=bf16"], "Did you mean 'bfloat16'?"),
        (["model.dtype=fp32"], "Did you mean 'float32'?"),
        (["semantics=release"], "Did you mean 'released'?"),
        (["rlvr.loss=grop"], "Did you mean 'grpo'?"),
    ],
)
def test_a_wrong_value_is_told_with_the_right_one(overrides, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config("digits", overrides)


def test_a_list_of_a_file_is_told_how_it_is_written(tmp_path):
    (tmp_path / "mine.yaml").write_text("align: {weights: 0.5}\n")
    with pytest.raises(ConfigError, match=re.escape("align.weights); it takes a list: [..., ...]")):
        load_config(str(tmp_path / "mine.yaml"))


def test_recipes_complete(tmp_path, monkeypatch):
    assert commands.complete_recipe("")[: len(shipped_recipes())] == shipped_recipes()
    assert commands.complete_recipe("dig")[0] == "digits"
    (tmp_path / "more").mkdir()
    for name in ("mine.yaml", "notes.txt", "more/other.yml", ".hidden.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert commands.complete_recipe("m") == ["mine.yaml", "more/"]
    assert commands.complete_recipe("more/") == ["more/other.yml"]
    assert commands.complete_recipe(str(tmp_path / "mi")) == [str(tmp_path / "mine.yaml")]
    assert commands.complete_recipe("no/such/folder/") == []


def test_overrides_complete_one_level_at_a_time():
    assert commands.complete_override("al") == ["align."]
    assert commands.complete_override("align.st") == ["align.steps="]
    assert commands.complete_override("warmup.optimizer.l") == ["warmup.optimizer.lr="]
    assert commands.complete_override("align.steps=1") == []
    assert commands.complete_override("align.steps.x") == commands.complete_override("nothing.") == []
    assert set(commands.complete_override("")) == {
        field.name + ("." if dataclasses.is_dataclass(getattr(Config(), field.name)) else "=")
        for field in dataclasses.fields(Config)
    }
    for key in commands.complete_override("rlvr.rollout."):
        load_config("digits", [f"{key}2"])  # a group of one response is refused, so not 1


def test_the_shell_gets_completions():
    """What the installed completion of a shell asks, through the machinery of the command-line library."""

    def complete(line: str) -> list[str]:
        code = "import sys; from prism_fast.cli import app; app(prog_name='prism-fast')"
        ask = {"_PRISM_FAST_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **ask}, capture_output=True, text=True
        )
        return done.stdout.split()

    assert complete("prism-fast run dig") == ["digits"]
    assert complete("prism-fast plan digits align.st") == ["align.steps="]
    assert complete("prism-fast do") == ["doctor"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "runs/x"), "No space left on device"),
        (ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"), "prism-fast doctor"),
        (ValueError("what is wrong"), "what is wrong"),
    ],
)
def test_errors_a_user_can_cure(command, monkeypatch, error, words):
    def fails():
        raise error

    monkeypatch.setattr(cli, "app", fails)
    code, message = command()
    assert code == 1 and words in message and type(error).__name__ in message and "Traceback" not in message
    monkeypatch.setenv("PRISM_FAST_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_an_unknown_run_directory_names_the_nearest(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for name in ("runs/digits-1", "other/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    for name in ("resume", "report"):
        for typed, words in (
            ("runs/digit-1", "Did you mean 'runs/digits-1'"),
            ("digits-1", "Did you mean 'runs/digits-1'"),
            ("other/mien", "Did you mean 'other/mine'"),
            ("notes", "notes is not a run directory: it has no config.yaml"),
            ("entirely/else", "entirely/else does not exist"),
        ):
            code, message = command(name, typed)
            assert code == 1 and words in message and ("Did you mean" in words) == ("Did you mean" in message)


def _ends(error: BaseException):
    def run(config, console, **how):
        folder = Path(config.out)
        folder.mkdir()
        (folder / "config.yaml").write_text("[" if isinstance(error, ValueError) else dump_config(config))
        (folder / "metrics.jsonl").write_text("")
        raise error

    return run


def test_a_stopped_run_says_how_to_go_on_and_a_failed_one_why(tmp_path, monkeypatch, invoke, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run_stages", _ends(Stopped("align step 3")))
    code, shown = invoke("run", "digits", "out=a[red]b")
    assert code == 0 and "stopped at align step 3, saved; go on with: prism-fast resume a[red]b" in shown
    assert (tmp_path / "a[red]b" / "report.html").exists()
    monkeypatch.setattr(pipeline, "run_stages", _ends(ValueError("why it failed")))
    code, message = command("run", "digits", "out=failed")
    assert code == 1 and "why it failed" in message, "an unreadable run has no report, which hides nothing"
    monkeypatch.setattr(pipeline, "run_eval", _ends(Stopped("evaluation after eval")))
    code, shown = invoke("eval", "digits", "out=graded")
    assert code == 0 and "prism-fast resume graded" in shown


@pytest.mark.parametrize("refusal", [ConfigError, CheckpointError, RecordError])
def test_a_refused_resume_writes_no_report_and_a_failed_one_does(tmp_path, monkeypatch, command, refusal):
    def refuses(error):
        def run(config, console, **how):
            raise error

        return run

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config("digits", ["out=mine"])))
    (folder / "metrics.jsonl").write_text("")
    before = sorted(folder.iterdir())
    monkeypatch.setattr(pipeline, "run_stages", refuses(refusal("put it back")))
    code, message = command("resume", "mine")
    assert code == 1 and "put it back" in message and sorted(folder.iterdir()) == before
    monkeypatch.setattr(pipeline, "run_stages", refuses(FloatingPointError("step 3")))
    code, message = command("resume", "mine")
    assert code == 1 and "step 3" in message and (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("run", 0), ("eval", 0), ("run digits --dry-run", None), ("doctor", None), ("--help", None)]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps(monkeypatch, capfd, name, code, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["prism-fast", *name.split()])
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == (128 + number if code is None else code)
    assert capfd.readouterr().err == f"stopped by {number.name}; no step was in progress, nothing is lost\n"
    assert signal.getsignal(number) is before


def test_a_signal_while_libraries_are_imported(tmp_path):
    """SIGTERM at the import of torch, which takes seconds: a line, exit code 0, and no run directory."""
    code = (
        "import os, signal, sys\n"
        "class Signal:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Signal)\n"
        "sys.argv = ['prism-fast', 'run', 'digits']\n"
        "from prism_fast.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done
    assert done.stderr.startswith("stopped by SIGTERM") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ImportError("x", name="prism_fast.nothing"), ZeroDivisionError("x"), KeyError("x")])
def test_defects_keep_their_traceback(monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(type(error)):
        cli.main()
