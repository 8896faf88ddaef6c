"""The package in its forms, from a copy of the tree: bare checkout, wheel without CUDA, builds that are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is needed to build, without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("bench", "csrc", "kernels", "prism_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PRISM_FAST_") and k != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=110)


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


def test_bare_checkout_works_and_says_what_is_missing(tree):
    package, logprob, suite, available, cuda, total, why = python(USE, tree).splitlines()
    assert Path(suite) == tree / "bench" / "ops" / "suite.py"
    assert Path(package).is_relative_to(tree) and Path(logprob) == tree / "kernels" / "logprob" / "__init__.py"
    assert (available, cuda, float(total)) == ("False", "False", 0.0)
    assert "prism_fast._C" in why and "build_ext --inplace" in why


@pytest.fixture(scope="module")
def installed(tree, tmp_path_factory) -> Path:
    """The unpacked wheel of a build without CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "-w", str(out), "."], tree, PRISM_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("prism_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


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
        if path.suffix in (".py", ".yaml", ".j2", ".css", ".js", ".html"):
            assert (installed / path.relative_to(ROOT)).is_file(), path
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
