"""Checkpoint folders and data files small enough for milliseconds, and ways to call the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prism_fast import cli
from prism_fast.data.samples import Demonstration, Task
from prism_fast.data.writers import write_sharegpt, write_tasks
from prism_fast.models.convert import upcycle_folder
from prism_fast.models.policy import build_tiny_policy, save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from tests.models.conftest import SMALL, corpus


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.build(train_tokenizer(corpus(), 600))


@pytest.fixture(scope="session")
def policy(processor):
    return build_tiny_policy(processor, SMALL, seed=11).eval()


@pytest.fixture(scope="session")
def policy_folder(policy, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    save_policy(policy, processor, folder)
    return folder


@pytest.fixture(scope="session")
def discriminator_folder(policy_folder) -> Path:
    folder = policy_folder.with_name("discriminator")
    upcycle_folder(policy_folder, folder, seed=2)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory) -> dict[str, Path]:
    """Published formats without images: ``sft``, ``sft_val``, ``align``, ``rlvr``, ``eval``."""
    folder = tmp_path_factory.mktemp("data")
    prompt = [{"role": "user", "content": "What is 1 + 1?"}]
    write_sharegpt(folder / "sft.json", [Demonstration(f"d{i}", prompt, "2", []) for i in range(3)])
    teacher = {"teacher_caption": "<caption>x</caption>", "teacher_cot": "<think>y</think>", "teacher_response": "z"}
    tasks = [Task(f"t{i}", prompt, [], "math-77k", "2", question="What?", **teacher) for i in range(4)]
    write_tasks(folder / "align.parquet", tasks)
    write_tasks(
        folder / "rlvr.parquet", [Task(f"t{i}", prompt, [], "math-77k", "2", question="What?") for i in range(5)]
    )
    sft, rlvr = folder / "sft.json", folder / "rlvr.parquet"
    return {"sft": sft, "sft_val": sft, "align": folder / "align.parquet", "rlvr": rlvr, "eval": rlvr}


@pytest.fixture
def invoke() -> Callable[..., tuple[int, str]]:
    """``invoke("plan", "digits")``: exit code and standard output (with the usage error where there is one)."""

    def call(*arguments: object, **options: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False, **options)
        return result.exit_code, result.stdout if result.exit_code < 2 else result.output

    return call


@pytest.fixture
def invoke_json(invoke) -> Callable[..., object]:
    return lambda *arguments: json.loads(invoke(*arguments, "--json")[1])


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """The installed command's entry point: exit code, and what stood on standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prism-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call
