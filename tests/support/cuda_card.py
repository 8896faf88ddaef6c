"""The CUDA kernels of ``csrc/`` on a processor of the tests (``cuda/processor.h``), for machines without a card.

``build`` compiles the whole module with the host's compiler. As a plugin this file puts that module in the place of the
compiled one, sends every call to its CUDA form, and runs those tests alone that would run on a card as well:

    python -m pytest -p tests.support.cuda_card tests/native/test_policy_loss.py
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CARD = Path(__file__).resolve().parent / "cuda"
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
    "-U__gnu_linux__",  # one compilation of each loop; ThreadSanitizer cannot start where the loader has to pick one
    "-U_FORTIFY_SOURCE",  # its longjmp knows one stack
    "-DPRISM_FAST_CUDA=1", '-DPRISM_FAST_CUDA_ARCHS="none"',
)  # fmt: skip


def translated(source: str) -> str:
    """CUDA C++ as the host's compiler reads it: arrays that blocks share, and launches."""
    declared = iter(range(1000))

    def arrays(match: re.Match) -> str:
        kind, names = match[1], re.findall(r"(\w+)((?:\[[^]]+\])+)", match[2])
        return " ".join(f"auto& {name} = processor::shared<{kind}{size}, {next(declared)}>();" for name, size in names)

    source = re.sub(r"__shared__ ([\w:]+) ([^;]+);", arrays, source)
    return re.sub(r"(\w+)<<<([^,]+), ([^,]+), 0, [^;]+>>>\(", r"processor::launch(\1, \2, \3, ", source)


def build(changed: dict[str, str] | None = None, sanitizer: str | None = None) -> Path:
    """Path of the module ``_C``; ``changed`` are other texts for files of ``csrc/``.

    What has been compiled before stays in the folder for temporary files. All of it takes most of a minute.
    """
    import pybind11

    texts = {p.name: p.read_text() for p in sorted(CSRC.iterdir())} | (changed or {})
    texts = {name: translated(text) if name.endswith((".cu", ".cuh")) else text for name, text in texts.items()}
    ours = {p.name: p.read_text() for p in sorted(CARD.iterdir())}
    include = (pybind11.get_include(), sysconfig.get_path("include"))
    command = ["g++", *FLAGS, *(f"-I{path}" for path in include)]
    command += [] if sanitizer is None else [f"-fsanitize={sanitizer}", "-g1"]
    folder = Path(tempfile.gettempdir(), f"prism-fast-card-{os.getuid()}")
    folder.mkdir(exist_ok=True)

    def compiled(source: str) -> str:
        plain = source.endswith(".cpp") and source not in ours  # reads no header of CUDA
        headers = {n: t for n, t in texts.items() if n.endswith(".h" if plain else (".h", ".cuh"))}
        headers |= {} if plain else {n: t for n, t in ours.items() if n.endswith(".h")}
        text = ours[source] if source in ours else texts[source]
        key = hashlib.sha256(repr((command, source, text, headers)).encode()).hexdigest()[:24]
        target = folder / f"{key}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory() as place:
                for name, content in {**headers, source: text}.items():
                    Path(place, name).write_text(content)
                _run([*command, f"-I{place}", "-c", "-x", "c++", f"{place}/{source}", "-o", f"{place}/done"])
                shutil.move(f"{place}/done", target)
        return str(target)

    sources = [name for name in (*texts, *ours) if name.endswith((".cpp", ".cu"))]
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(max_workers=2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # binding.cpp first: it takes as long as all others together.
        objects = list(pool.map(compiled, sorted(sources, key=lambda name: name != "binding.cpp")))
        module = folder / f"{hashlib.sha256(repr(objects).encode()).hexdigest()[:24]}.so"
        if not module.exists():
            _run([*command, "-shared", "-pthread", *objects, "-ldl", "-o", f"{module}.part"])
            os.replace(f"{module}.part", module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{shlex.join(command)}` failed:\n{done.stdout}{done.stderr}")


def run(module: Path, *what: str, **settings: str) -> subprocess.CompletedProcess:
    """Tests ``what`` in a process of their own, which has ``module`` for its compiled module."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.cuda_card", "-p", "no:cacheprovider", "-q", "-x"]
    if "LD_PRELOAD" in settings and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants its addresses where older kernels put them
    environment = os.environ | {"PRISM_CARD_MODULE": str(module), "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(
        [*command, "-o", "timeout=1500", *what], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def passed(done: subprocess.CompletedProcess) -> int:
    """How many tests of a `run` passed."""
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


def pytest_configure(config: pytest.Config) -> None:
    """Before any test file is imported."""
    import prism_fast

    path = os.environ.get("PRISM_CARD_MODULE") or str(build())
    spec = importlib.util.spec_from_file_location("prism_fast._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["prism_fast._C"] = prism_fast._C = module
    from prism_fast.ops.native import calls

    calls.on_card = lambda x: True
    calls.stream_of = lambda x: 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [x for x in items if getattr(x, "callspec", None) and x.callspec.params.get("device") == "cpu"]
    config.hook.pytest_deselected(items=[x for x in items if x not in chosen])
    items[:] = chosen
