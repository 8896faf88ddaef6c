"""A very small run of all stages, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from prism_fast.config import load_config
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.digits import DigitsFiles, write_digits
from prism_fast.data.readers import read_tasks
from prism_fast.data.samples import Demonstration
from prism_fast.data.writers import write_sharegpt
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.train.pipeline import run_stages
from tests.support.shared import made_once

SMALL = [
    "threads=1",
    "model.tiny.vocab_size=600",
    "model.tiny.num_layers=2",
    "sft.batch=16",
    "sft.max_updates=90",
    "sft.eval_every=30",
    "sft.optimizer.lr=4e-3",
    "sft.tokens_per_micro_batch=1200",
    "warmup.prompts=2",
    "warmup.pairs_per_prompt=2",
    "warmup.eval_every=2",
    "warmup.target_margin=-100",
    "warmup.heldout_share=0.2",
    "align.steps=2",
    "align.prompts=2",
    "align.rollout.n=4",
    "rlvr.steps=2",
    "rlvr.prompts=2",
    "rlvr.rollout.n=4",
    *(f"{key}.max_new_tokens=72" for key in ("warmup", "align.rollout", "rlvr.rollout", "eval")),
]


@pytest.fixture(scope="module")
def processor() -> Processor:
    """With a vocabulary of 320."""
    return Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))


def write_small_data(folder: Path) -> None:
    spec = DigitsSpec(sft_images=2, sft_val_images=2, align_tasks=48, rlvr_tasks=8, eval_images=2)
    files = write_digits(folder / "digits", spec, seed=3)
    tasks = read_tasks(files.align, require_teacher=True)
    demos = [Demonstration(t.uid, t.messages, t.teacher_response, t.images) for t in (tasks[i] for i in range(48))]
    write_sharegpt(folder / "sft.json", demos)
    write_sharegpt(folder / "sft_val.json", demos[:8])


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> list[str]:
    """Published-format files, small enough for seconds; the SFT set is the exact teacher's, soon learnt."""
    folder = made_once(tmp_path_factory, "small", write_small_data)
    files = DigitsFiles.in_folder(folder / "digits")
    paths = {"sft": folder / "sft.json", "sft_val": folder / "sft_val.json"}
    paths |= {"align": files.align, "rlvr": files.rlvr, "eval": files.eval}
    return ["data.source=files", *(f"data.{name}={path}" for name, path in paths.items())]


def run_small(folder: Path, overrides: list[str]) -> Path:
    return run_stages(load_config("digits", [*overrides, f"out={folder}"]), Console(quiet=True))


@pytest.fixture(scope="session")
def small_run(small_data) -> list[str]:
    """Overrides of the digits recipe that make it small."""
    return [*small_data, *SMALL]


@pytest.fixture(scope="session")
def finished(small_run, tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "finished", lambda folder: run_small(folder, small_run))


@pytest.fixture(scope="session")
def run_again(small_run):
    """Run the same again, with further overrides, in another folder."""
    return lambda folder, *overrides: run_small(folder, [*small_run, *overrides])
