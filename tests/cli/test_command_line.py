"""Version, suggestions, completion, and which errors become one message."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prism_fast
from prism_fast import cli, commands
from prism_fast.config import Config, dump_config, load_config, shipped_recipes
from prism_fast.train import pipeline
from prism_fast.train.signals import Stopped

ROOT = Path(prism_fast.__file__).resolve().parents[1]


def test_version(invoke):
    assert invoke("--version") == (0, f"prism-fast {prism_fast.__version__}\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(["aling"], "align"), (["docter"], "doctor"), (["convert", "upcylce"], "upcycle"), (["data", "chek"], "check")],
)
def test_an_unknown_command_names_the_nearest(invoke, typed, meant):
    code, shown = invoke(*typed)
    assert code == 2 and f"Did you mean '{meant}'" in shown


def test_an_unknown_recipe_names_the_nearest(command):
    code, message = command("plan", "digts")
    assert code == 1 and "Did you mean 'digits'" in message


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
    def run(config, console, resume):
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
