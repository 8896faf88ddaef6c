"""Examines this machine for prism-fast: which parts it has, which are missing or broken, and how to get them.

Nothing of the package or of its dependencies is imported at the top, so that a broken installation can be examined.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "prism-fast"
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}
# Used where installed; in no extra, because no package index has them.
UNLISTED = {"flash-attn-3": "optional: model.attention=fa3 on cards of 9.x; built from flash-attention's folder hopper"}
NEEDED = (None, "train")  # requirements of ops and trainer; other extras are optional
SECONDS = 20  # for a compiler or a driver tool to answer


@dataclass(frozen=True)
class Check:
    """One check. ``state``: ``ok``, ``absent`` (and not needed), or ``broken`` (and needed here)."""

    group: str
    name: str
    state: str
    found: str
    wanted: str = ""
    cure: str = ""


def examine() -> list[Check]:
    """Run all checks; a fault becomes a check's state, never an exception."""
    requirements, python = declared()
    checks = [_python(python), *packages(requirements), *_compilers(), *_devices()]
    return [*checks, *_compiled(), *_ops(), *_parts(), *_trunk(), *_attention()]


def healthy(checks: Iterable[Check]) -> bool:
    """Whether no check is ``broken``."""
    return all(check.state != "broken" for check in checks)


def declared() -> tuple[list[tuple[Requirement, str | None]], str]:
    """(requirement, extra or None) of everything the package declares, and the Python versions it supports: from the
    checkout's ``pyproject.toml``, else from the installed metadata."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
    if project.get("name") == DISTRIBUTION:
        extras = project["optional-dependencies"]
        listed = [(Requirement(text), None) for text in project["dependencies"]]
        listed += [(Requirement(text), extra) for extra, texts in extras.items() for text in texts]
        return listed, project["requires-python"]
    about = metadata.metadata(DISTRIBUTION)
    listed = []
    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        listed.append((requirement, extra[1] if extra else None))
    return listed, about["Requires-Python"] or ""


def packages(requirements: Iterable[tuple[Requirement, str | None]]) -> list[Check]:
    """Every declared package: present, absent, outside its range, or not importable. Packages of extras other than
    ``train`` are looked up, not imported (some take a minute); one outside its range is broken, for it would be
    used."""
    checks: dict[str, Check] = {}
    for requirement, extra in sorted(requirements, key=lambda entry: entry[1] == "test"):  # users want the others
        if requirement.name in checks:
            continue  # required anyway, or in another extra too
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra or ""}):
            continue
        checks[requirement.name] = _package(requirement, extra)
    for name, cure in UNLISTED.items():
        version = _version(name)
        checks[name] = Check("optional", name, "absent" if version is None else "ok", version or "absent", "", cure)
    return list(checks.values())


def _package(requirement: Requirement, extra: str | None) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    where = "packages" if extra is None else f"extra {extra}"
    again = f"pip install '{name}{wanted}'"
    version = _version(name)
    if version is None:
        if extra in NEEDED:
            return Check(where, name, "broken", "absent", wanted, again)
        return Check(
            where, name, "absent", "absent", wanted, f"pip install '.[{extra}]' in the checkout, if you need it"
        )
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(where, name, "broken", f"{version}, outside the supported range", wanted, again)
    if extra in NEEDED:
        try:
            importlib.import_module(IMPORT_NAMES.get(name, name.replace("-", "_")))
        except Exception as error:  # a broken package may raise anything; the check reports it
            return Check(where, name, "broken", f"{version}, import fails: {_one_line(error)}", wanted, again)
    return Check(where, name, "ok", version, wanted)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python(wanted: str) -> Check:
    version = platform.python_version()
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    cure = "" if fits else "make a virtual environment with a supported Python"
    return Check("python", "python", "ok" if fits else "broken", f"{version} ({sys.executable})", wanted, cure)


def _compilers() -> list[Check]:
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    nvcc = os.environ.get("PRISM_FAST_NVCC")
    if not nvcc:
        home = os.environ.get("CUDA_HOME")
        nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or "nvcc"
    return [
        _compiler("C++", cxx, "to build the compiled module: install g++ or clang, or name one in CXX"),
        _compiler("nvcc", nvcc, "to build the CUDA kernels: install the CUDA toolkit, or name nvcc in PRISM_FAST_NVCC"),
    ]


def _compiler(name: str, command: str, cure: str) -> Check:
    words = command.split()  # CXX may hold a launcher and flags
    if shutil.which(words[0]) is None:
        return Check("compilers", name, "absent", "absent", "", cure)
    said = _output([*words, "--version"])
    line = next((text for text in said.splitlines() if re.search(r"\d+\.\d+", text)), "no version told")
    return Check("compilers", name, "ok", f"{line.strip()} ({words[0]})")


def _devices() -> list[Check]:
    try:
        import torch
    except Exception:  # reported among the packages
        return []
    if torch.cuda.is_available():
        return [
            Check("devices", f"cuda:{i}", "ok", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
            for i, p in ((i, torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        ]
    cards = [line for line in _output(["nvidia-smi", "-L"]).splitlines() if line.startswith("GPU ")]
    if cards:
        built = torch.version.cuda
        cause = f"built for CUDA {built}; its driver may be too old" if built else "built without CUDA"
        found = f"{len(cards)} GPU(s) that torch {torch.__version__} cannot use ({cause})"
        return [Check("devices", "cuda", "broken", found, "", "install a torch that fits the driver's CUDA version")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Check("devices", "cuda", "absent", f"no GPU; {cores} CPU cores, {torch.get_num_threads()} threads")]


def _compiled() -> list[Check]:
    try:
        import torch

        from prism_fast.ops import native
    except Exception as error:
        return [Check("compiled", "prism_fast._C", "broken", f"cannot be looked at: {_one_line(error)}")]
    gpu = torch.cuda.is_available()
    if not native.available():
        # Without a GPU the references do the same work; with one, ops on CUDA tensors refuse to run.
        state = "broken" if gpu else "absent"
        return [Check("compiled", "prism_fast._C", state, "not usable", "", native.why_not())]
    if not native.has_cuda():
        state = "broken" if gpu else "ok"
        return [Check("compiled", "prism_fast._C", state, "CPU kernels only", "", native.why_not())]
    archs = str(native.module().cuda_archs)
    checks = [Check("compiled", "prism_fast._C", "ok", f"CPU and CUDA kernels, sm_{archs.replace(',', ', sm_')}")]
    for i in range(torch.cuda.device_count() if gpu else 0):
        major, minor = torch.cuda.get_device_capability(i)
        if not covers(archs, major, minor):
            cure = f"build again with PRISM_FAST_CUDA_ARCHS={major}{minor}"
            found = f"no code for sm_{major}{minor}"
            checks.append(Check("compiled", f"kernels for cuda:{i}", "broken", found, f"one of {archs}", cure))
    return checks


def covers(archs: str, major: int, minor: int) -> bool:
    """Whether a build for ``archs`` ("80,90a,100") runs on a card of this compute capability: machine code of the same
    generation and no newer minor version (``a``: of exactly that one), or the PTX of the lowest plain architecture."""
    card = 10 * major + minor
    plain = [int(arch) for arch in archs.split(",") if arch.isdigit()]
    exact = [int(arch.rstrip("af")) for arch in archs.split(",") if arch and not arch.isdigit()]
    same = any(arch // 10 == major and arch <= card for arch in plain)
    return same or card in exact or bool(plain and min(plain) <= card)


def _ops() -> list[Check]:
    try:
        import torch

        from prism_fast import ops
        from prism_fast.ops import backend
        from prism_fast.ops.moe_experts import ON_CUDA

        available = ops.available()
    except Exception as error:
        return [Check("ops", "prism_fast.ops", "broken", f"cannot be imported: {_one_line(error)}")]
    checks = [Check("ops", op, "ok", ", ".join(backends)) for op, backends in available.items()]
    if torch.cuda.is_available() and not any("triton" in backends for backends in available.values()):
        cure = "pip install '.[gpu]' in the checkout"
        checks.append(Check("ops", "triton kernels", "broken", "not usable on the GPU that is here", "", cure))
    stock = [f"{str(d).removeprefix('torch.')} on {m}.x" for (m, d), chosen in ON_CUDA.items() if chosen == "stock"]
    checks.append(Check("ops", "moe_experts on CUDA", "ok", f"stock for {', '.join(stock)}, otherwise triton"))
    wish = os.environ.get(backend.ENVIRONMENT)
    if wish and wish not in backend.KNOWN:
        cure = f"unset it, or set it to one of {', '.join(backend.KNOWN)}"
        checks.append(Check("ops", backend.ENVIRONMENT, "broken", f"is {wish!r}", "", cure))
    return checks


def _parts() -> list[Check]:
    """The trainer as a whole: packages that work alone may fail together (a torchvision built for another torch)."""
    try:
        importlib.import_module("prism_fast.train.pipeline")
    except Exception as error:
        cure = "mend what the message names; packages built for another torch are the usual cause"
        return [Check("trainer", "prism_fast.train", "broken", f"import fails: {_one_line(error)}", "", cure)]
    return [Check("trainer", "prism_fast.train", "ok", "imports")]


def _trunk() -> list[Check]:
    """The kernels that ``model.fused_trunk=auto`` selects here."""
    try:
        import torch

        from prism_fast.models.fused_trunk import trunk_kernels

        gpu = torch.cuda.is_available()
        found = trunk_kernels("auto", torch.device("cuda" if gpu else "cpu"), torch.bfloat16)
    except Exception:  # reported for the trainer as a whole
        return []
    used = found.startswith("liger")
    cure = "pip install '.[gpu]' in the checkout" if gpu and not used else ""
    return [Check("trainer", "norms, rotary, SwiGLU", "ok" if used else "absent", found, "", cure)]


def _attention() -> list[Check]:
    """The attention kernels that ``model.attention=auto`` selects here, in half precision."""
    try:
        import torch

        from prism_fast.ops import backend, flash

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        asked = os.environ.get(backend.ENVIRONMENT) or None
        found = flash.describe("auto", device, torch.bfloat16, asked)
    except Exception:  # reported for torch and the ops
        return []
    return [Check("trainer", "attention", "ok", found)]


def _output(command: list[str]) -> str:
    """Standard output of a command, empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"
