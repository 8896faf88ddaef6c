"""The package in its forms: source distribution, what it unpacks to, wheel without CUDA, an environment that has torch
alone, builds that are refused."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The unpacked source distribution, without anything built."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("bench", "csrc", "kernels", "prism_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    done = run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"], copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (packed,) = (copy / "dist").glob("prism_fast-*.tar.gz")
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(packed) as archive:
        archive.extractall(out, filter="data")
    (found,) = out.iterdir()
    return found


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PRISM_FAST_") and k != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def isolated(code: str, cwd: Path, package: Path) -> subprocess.CompletedProcess:
    """Runs ``code`` with the copy of the package in ``package`` and the installed packages. Without ``site``, which
    would put the editable installation in: its finder completes any copy with what the checkout has."""
    where = os.pathsep.join((str(package), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    return run([sys.executable, "-S", "-c", code], cwd, PYTHONPATH=where)


def python(code: str, cwd: Path, package: Path | None = None) -> str:
    done = isolated(code, cwd, package or cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, prism_fast
from prism_fast import ops
from prism_fast.ops import native
import prism_fast.kernels.logprob, prism_fast.bench.ops.suite
a = ops.group_advantage(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), weights=[1.0])
print(prism_fast.__file__, prism_fast.kernels.logprob.__file__, prism_fast.bench.ops.suite.__file__, sep="\\n")
print(native.available(), native.has_cuda(), a.sum().item(), sep="\\n")
print(native.why_not())
"""


def test_source_distribution_holds_the_sources_and_no_strangers(tree):
    parts = {"bench", "csrc", "kernels", "prism_fast"}
    assert parts < {path.name for path in tree.iterdir()} and not (tree / "tests").exists()
    for part in parts:
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".yaml", ".j2", ".css", ".js", ".typed"):
                assert (tree / path.relative_to(ROOT)).is_file(), path
    assert not [path for path in tree.rglob("*") if path.suffix in (".so", ".o", ".pyc")]


def test_bare_checkout_works_and_says_what_is_missing(tree):
    package, logprob, suite, available, cuda, total, why = python(USE, tree).splitlines()
    assert Path(suite) == tree / "bench" / "ops" / "suite.py"
    assert Path(package).is_relative_to(tree) and Path(logprob) == tree / "kernels" / "logprob" / "__init__.py"
    assert (available, cuda, float(total)) == ("False", "False", 0.0)
    assert "prism_fast._C" in why and "build_ext --inplace" in why


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """Of a build without CUDA, and without optimisation: what is tested is its contents."""
    out = tmp_path_factory.mktemp("wheel")
    compiler = out / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or shutil.which("c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "-w", str(out), "."], tree, PRISM_FAST_CUDA="0", CXX=str(compiler), CC=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("prism_fast-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The unpacked wheel."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@needs_compiler
def test_wheel_without_cuda_serves_the_cpu(installed, tmp_path):
    package, logprob, suite, available, cuda, total, why = python(USE, tmp_path, installed).splitlines()
    assert Path(suite) == installed / "prism_fast" / "bench" / "ops" / "suite.py"
    assert Path(package).is_relative_to(installed)
    assert Path(logprob) == installed / "prism_fast" / "kernels" / "logprob" / "__init__.py"
    assert (available, cuda, float(total)) == ("True", "False", 0.0)
    assert "without CUDA" in why and "nvcc" in why


@needs_compiler
def test_wheel_holds_the_data_and_no_strangers(installed):
    assert {p.name for p in installed.iterdir()} - {"prism_fast"} == {f"prism_fast-{version(installed)}.dist-info"}
    recipes = {p.name for p in (ROOT / "prism_fast" / "recipes").glob("*.yaml")}
    assert recipes and recipes <= {p.name for p in (installed / "prism_fast" / "recipes").iterdir()}
    for path in (ROOT / "prism_fast").rglob("*"):
        if path.suffix in (".py", ".yaml", ".j2", ".css", ".js", ".html", ".typed"):
            assert (installed / path.relative_to(ROOT)).is_file(), path
    assert (installed / "prism_fast" / "py.typed").is_file()
    assert not list(installed.rglob("*.cu")) and not list(installed.rglob("*.cpp"))
    scripts = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "prism-fast = prism_fast.entry:main" in scripts.read_text()


ALONE = """
import sys
import torch
given = set(sys.modules)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("prism_fast", "torch", *sys.stdlib_module_names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from prism_fast import ops
loaded = {name.split(".")[0] for name in set(sys.modules) - given}
assert loaded <= {"prism_fast", "torch", *sys.stdlib_module_names}, loaded
assert "prism_fast._C" not in sys.modules and "torch.utils.cpp_extension" not in set(sys.modules) - given
torch.manual_seed(0)
scores = torch.randn(4, 2)
advantage = ops.group_advantage(scores, torch.tensor([0, 0, 1, 1]), weights=[0.5, 0.5])
hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(11, 16, requires_grad=True)
cu = torch.tensor([0, 1, 3, 4, 6], dtype=torch.int32)
loss, stats = ops.linear_policy_loss(hidden, weight, torch.arange(6), advantage, cu, loss="dapo")
loss.backward()
print(float(weight.grad.abs().sum()) > 0, "prism_fast._C" in sys.modules)
from prism_fast.entry import main
main()
"""


@needs_compiler
def test_ops_run_and_the_command_explains_itself_with_torch_alone(installed, tmp_path):
    done = isolated(ALONE, tmp_path, installed)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'prism-fast[train]'" in done.stderr and "typer is missing" in done.stderr


def with_requirements(name: str) -> set[str]:
    """Names of an installed distribution and of all that it requires here."""
    requirements = pytest.importorskip("packaging.requirements")
    found, todo = set(), [name]
    while todo:
        if (name := todo.pop()) in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = requirements.Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment that has torch with its own requirements, and the wheel by pip."""
    root = tmp_path_factory.mktemp("clean")
    given = root / "given"
    given.mkdir()
    for name in with_requirements("torch"):
        for file in importlib.metadata.files(name):
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (given / top).exists():
                (given / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    done = run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], root)
    assert done.returncode == 0, done.stderr
    python = root / "venv" / "bin" / "python"
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site / "given.pth").write_text(f"{given}\n")
    # Without --no-deps: what the wheel requires must be satisfied by torch alone.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    done = run([*pip, str(wheel)], root)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


IMPORT = """
import importlib.util, sys, time
for absent in ("transformers", "triton", "pybind11", "typer"):
    assert importlib.util.find_spec(absent) is None, absent
import torch
given = set(sys.modules)
start = time.process_time()
from prism_fast import ops
print(time.process_time() - start)
print(*sorted(set(sys.modules) - given))
"""


@needs_compiler
def test_an_environment_with_torch_alone_imports_the_ops_at_once(torch_alone, tmp_path):
    for _ in range(5):
        done = run([str(torch_alone), "-c", IMPORT], tmp_path)
        assert done.returncode == 0, done.stderr
        seconds, loaded = done.stdout.splitlines()
        if float(seconds) < 0.3:
            break
    else:
        pytest.fail(f"importing prism_fast.ops takes {seconds} s of CPU time beside torch")
    # Nothing beside the ops and their references: no compiled module, no kernels, no part of torch that it had not.
    assert {".".join(name.split(".")[:2]) for name in loaded.split()} == {"prism_fast", "prism_fast.ops"}
    assert len(loaded.split()) <= 50
    assert {name.split(".")[2] for name in loaded.split() if name.count(".") > 2} == {"reference"}


@needs_compiler
def test_an_environment_with_torch_alone_runs_an_op_and_explains_the_command(torch_alone, tmp_path):
    python = str(torch_alone)
    code = USE.replace("prism_fast.kernels.logprob, prism_fast.bench", "prism_fast.bench")
    code = code.replace("prism_fast.kernels.logprob.__file__, ", "")  # needs Triton
    done = run([python, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:5] == ["True", "False", "0.0"]
    done = run([str(torch_alone.with_name("prism-fast")), "--help"], tmp_path)
    assert done.returncode == 1 and "pip install 'prism-fast[train]'" in done.stderr, done.stderr


def version(installed: Path) -> str:
    return python("import prism_fast; print(prism_fast.__version__)", installed).strip()


def build(tree: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    return run(command, tree, **environment)


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"CXX": "no-such-compiler", "CC": "no-such-compiler"}, "no C++ compiler: 'no-such-compiler'"),
        ({"PRISM_FAST_CUDA": "yes"}, "PRISM_FAST_CUDA='yes' is not one of"),
        ({"PRISM_FAST_NVCC": "no-such-nvcc"}, "PRISM_FAST_NVCC='no-such-nvcc' is not an executable"),
        ({"PRISM_FAST_CUDA": "1", "PATH": "", "CUDA_HOME": ""}, "no nvcc"),
        ({"PRISM_FAST_NVCC": "nvcc", "PRISM_FAST_CUDA_ARCHS": "90a,12345"}, "['12345']"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_build_refusals_name_the_cause(tree, tmp_path, environment, message):
    if environment.get("PRISM_FAST_NVCC") == "nvcc" and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    if environment.get("PATH") == "":  # the compiler must stay reachable, nvcc must not
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        environment = environment | {"PATH": str(tmp_path / "bin"), "CXX": compiler, "CC": compiler}
    done = build(tree, tmp_path, **environment)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
