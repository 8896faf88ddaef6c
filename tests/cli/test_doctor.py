"""The doctor on this machine and on machines that lack something or have the wrong thing."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import prism_fast
from prism_fast import doctor, ops
from prism_fast.ops import native

ROOT = Path(prism_fast.__file__).resolve().parents[1]


def one(checks, name: str) -> doctor.Check:
    (found,) = [check for check in checks if check.name == name]
    return found


@pytest.fixture
def versions(monkeypatch):
    """``versions(transformers="4.57.6")``: other versions than the installed ones, None for a missing package."""
    real = doctor._version

    def replace(**wanted):
        names = {name.replace("_", "-"): version for name, version in wanted.items()}
        monkeypatch.setattr(doctor, "_version", lambda name: names[name] if name in names else real(name))

    return replace


def test_this_machine_is_examined_whole(invoke_json):
    shown = invoke_json("doctor")
    checks = {check["name"]: check for check in shown["checks"]}
    declared, _ = doctor.declared()
    here = {r.name for r, extra in declared if r.marker is None or r.marker.evaluate({"extra": extra or ""})}
    assert here <= set(checks) and {"torch", "transformers", "deepspeed", "vllm", "liger-kernel", "flash-attn"} <= set(
        checks
    )
    assert checks["torch"]["found"] == torch.__version__ and checks["torch"]["wanted"] == ">=2.11"
    for op, backends in ops.available().items():
        assert checks[op]["found"] == ", ".join(backends)
    assert {"C++", "nvcc", "prism_fast._C", "prism_fast.train", "python"} <= set(checks)
    assert checks["norms, rotary, SwiGLU"]["found"].startswith(("liger", "stock ("))
    assert "; packed rows: " in checks["attention"]["found"] and {"flash-attn-3", "flash-attn-4"} <= set(checks)
    assert shown["healthy"] == all(check["state"] != "broken" for check in checks.values())
    assert "://" not in json.dumps(shown)  # cures are words, never addresses


def test_exit_code_and_tables(invoke, monkeypatch):
    good = doctor.Check("packages", "torch", "ok", "2.13 [cpu]", ">=2.11")
    absent = doctor.Check("extra vllm", "vllm", "absent", "absent", "", "pip install '.[vllm]'")
    broken = doctor.Check("ops", "x", "broken", "gone", "", "put it back")
    for checks, code in (([good, absent], 0), ([good, broken], 1)):
        monkeypatch.setattr(doctor, "examine", lambda checks=checks: checks)
        found, shown = invoke("doctor", env={"COLUMNS": "150"})
        assert found == code and "2.13 [cpu]" in shown
        assert ("pip install '.[vllm]'" in shown) == (absent in checks)
        assert ("put it back" in shown) == (broken in checks)
        assert invoke("doctor", "--json")[0] == code


@pytest.mark.parametrize(
    ("text", "extra", "version", "state", "words"),
    [
        ("transformers>=5.16.1,<5.20", None, "4.57.6", "broken", "outside the supported range"),
        ("transformers>=5.16.1,<5.20", None, "5.20.0", "broken", "outside the supported range"),
        ("transformers>=5.16.1,<5.20", None, "5.17.0", "ok", "5.17.0"),
        ("torch>=2.11", None, "2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("torch>=2.11", None, None, "broken", "absent"),
        ("liger-kernel>=0.8.5", "gpu", None, "absent", "absent"),
        ("liger-kernel>=0.8.5", "gpu", "0.7.6", "broken", "outside the supported range"),
        ("liger-kernel>=0.8.5", "gpu", "0.8.8", "ok", "0.8.8"),
        ("winonly; sys_platform == 'win32'", None, None, None, ""),
    ],
)
def test_packages(versions, text, extra, version, state, words):
    requirement = Requirement(text)
    versions(**{requirement.name: version})
    found = [c for c in doctor.packages([(requirement, extra)]) if c.name == requirement.name]
    if state is None:
        assert found == []
        return
    assert found[0].state == state and words in found[0].found
    assert doctor.healthy(found) == (state != "broken")
    if state == "absent":
        assert f"[{extra}]" in found[0].cure
    elif state == "broken":
        assert f"pip install '{requirement.name}{requirement.specifier}'" == found[0].cure


def test_every_optional_package_is_imported_somewhere():
    files = [path for folder in ("prism_fast", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text() for path in files if path.name != "doctor.py")
    declared, _ = doctor.declared()
    optional = {requirement.name for requirement, extra in declared if extra not in (None, "train", "test", "docs")}
    modules = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn", "flash-attn-4": r"flash_attn\.cute"}
    for name in sorted(optional):
        module = modules.get(name, name)
        assert re.search(rf'(import|from) {module}\b|"{module}\.', source), name


def test_a_package_of_two_extras_is_named_with_the_one_for_users(versions):
    versions(**{"liger-kernel": None})
    listed = [(Requirement("liger-kernel>=0.8.5"), extra) for extra in ("test", "gpu")]
    assert "'.[gpu]'" in one(doctor.packages(listed), "liger-kernel").cure


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch):
    real = importlib.import_module

    def fails(name, *rest):
        if name == "PIL":
            raise OSError("libjpeg.so: cannot open\nshared object file")
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    found = one(doctor.packages([(Requirement("pillow"), None)]), "pillow")
    assert found.state == "broken" and "OSError: libjpeg.so: cannot open shared object file" in found.found


def test_an_old_python_is_broken(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.9")
    assert doctor._python(">=3.11").state == "broken"


def test_requirements_come_from_the_metadata_where_there_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "prism_fast" / "doctor.py"))
    listed = ["torch>=2.11", 'deepspeed>=0.19.5; extra == "deepspeed"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: listed)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    found, python = doctor.declared()
    assert [(r.name, extra) for r, extra in found] == [
        ("torch", None),
        ("deepspeed", "deepspeed"),
    ] and python == ">=3.11"
    assert one(doctor.packages(found), "deepspeed").group == "extra deepspeed"


def test_compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("PRISM_FAST_NVCC", str(tmp_path / "no-nvcc"))
    assert [(c.state, c.name in c.cure or "g++" in c.cure) for c in doctor._compilers()] == [("absent", True)] * 2
    for name in ("no-compiler", "no-nvcc"):
        tool = tmp_path / name
        tool.write_text("#!/bin/sh\necho a tool\necho release 12.3 of something\n")
        tool.chmod(0o755)
    assert [c.state for c in doctor._compilers()] == ["ok"] * 2
    assert all("release 12.3 of something" in c.found for c in doctor._compilers())


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_output", lambda command: "GPU 0: NVIDIA Something\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = doctor._devices()
    assert found.state == "broken" and "built without CUDA" in found.found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0" in doctor._devices()[0].found
    monkeypatch.setattr(doctor, "_output", lambda command: "")
    assert doctor._devices()[0].state == "absent"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_compiled_module_is_needed_where_a_gpu_is(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(native, "why_not", lambda: "the reason")
    monkeypatch.setattr(native, "available", lambda: False)
    (found,) = doctor._compiled()
    assert (found.state, found.cure) == ("broken" if gpu else "absent", "the reason")
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "has_cuda", lambda: False)
    (found,) = doctor._compiled()
    assert (found.state, found.found) == ("broken" if gpu else "ok", "CPU kernels only")


def test_a_card_without_code_for_it_is_broken(monkeypatch):
    class Module:
        cuda_archs = "90a,100"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0))[i])
    for name, value in (("available", True), ("has_cuda", True), ("module", Module)):
        monkeypatch.setattr(native, name, lambda value=value: value)
    built, missing = doctor._compiled()
    assert built.state == "ok" and "sm_90a" in built.found
    assert missing.state == "broken" and missing.name.endswith("cuda:1") and "PRISM_FAST_CUDA_ARCHS=80" in missing.cure


@pytest.mark.parametrize(
    ("archs", "card", "runs"),
    [
        ("80,90a,100", (8, 0), True),
        ("80,90a,100", (8, 9), True),  # same generation
        ("80,90a,100", (9, 0), True),
        ("80,90a,100", (12, 0), True),  # from the PTX of 80
        ("80,90a,100", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a", (8, 0), False),
        ("100", (9, 0), False),
        ("89", (8, 0), False),
    ],
)
def test_which_cards_a_build_covers(archs, card, runs):
    assert doctor.covers(archs, *card) is runs


def test_triton_is_needed_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "available", lambda: {"linear_logprob": ("reference",)})
    assert one(doctor._ops(), "triton kernels").state == "broken"
    monkeypatch.setattr(ops, "available", lambda: {"linear_logprob": ("reference", "triton")})
    assert doctor.healthy(doctor._ops())


def test_a_wrong_backend_in_the_environment_is_broken(monkeypatch):
    monkeypatch.setenv("PRISM_FAST_BACKEND", "cuda")
    found = one(doctor._ops(), "PRISM_FAST_BACKEND")
    assert found.state == "broken" and "reference, native, triton" in found.cure


def test_it_starts_where_the_trainer_cannot_be_imported():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['omegaconf'] = None\n"
        "from prism_fast.cli import main; sys.argv = ['prism-fast', *sys.argv[1:]]; main()"
    )

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)

    looked = run("doctor", "--json")
    broken = {c["name"] for c in json.loads(looked.stdout)["checks"] if c["state"] == "broken"}
    assert looked.returncode == 1 and {"transformers", "omegaconf", "prism_fast.train"} <= broken
    tried = run("run", "digits")
    assert tried.returncode == 1 and "omegaconf" in tried.stderr and "doctor" in tried.stderr
    assert "Traceback" not in tried.stderr
