"""The floors of the house: an import never climbs, ops stand alone, files stay small, nothing points at a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prism_fast"

# Ground first. A part may import from its own floor's lower neighbours and from itself, never from the same floor.
FLOORS = [
    {"kernels", "_C"},
    {"ops"},
    {"models", "algorithms"},
    {"data", "rewards", "released"},
    {"rollout", "engine", "track"},
    {"train"},
    {"report", "cli", "commands", "doctor", "plan", "preflight", "integrations", "bench"},
    {"entry"},
    {"__main__"},
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# `config` describes runs: only those who run them may read it.
CONFIG_READERS = {"train", "report", "cli", "commands", "plan", "preflight", "bench", "config"}
# Settings that `config` nests and those who live by them define: files of dataclasses that import nothing of ours.
SETTINGS = {
    *("prism_fast.data.digit_sizes", "prism_fast.data.entries"),
    *("prism_fast.engine.optimizer", "prism_fast.engine.settings"),
}
# Neighbours of one floor that may look at each other, in this direction only.
SIDEWAYS = {
    ("cli", "report"),  # the command line shows what the report makes
    ("cli", "commands"),  # and holds the commands that do not train
    ("cli", "preflight"),
    ("cli", "bench"),
    ("commands", "doctor"),
    ("commands", "plan"),
    ("commands", "report"),  # the preview of a data file shows spans as the report does
    ("preflight", "plan"),
    ("released", "data"),
    ("released", "rewards"),
    ("rewards", "data"),  # the answer is graded in the section that the response grammar cut out
}

# The only files that know what `semantics=released` is made of; each offers it by that name, from no higher than it.
REGISTRIES = {
    "prism_fast/algorithms/alignment_loss.py",
    "prism_fast/algorithms/semantics.py",
    "prism_fast/data/framing.py",
    "prism_fast/rewards/rules.py",
}


def python_files() -> list[Path]:
    folders = ("prism_fast", "kernels", "bench/ops", "bench/step")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str | None:
    relative = path.relative_to(ROOT)
    if relative.parts[0] in ("kernels", "bench"):
        return relative.parts[0]
    name = relative.parts[1]
    return None if name == "__init__.py" else name.removesuffix(".py")


def imported_parts(path: Path) -> set[tuple[str, int]]:
    """(part of prism_fast, line) of every import in a file, also inside functions and under TYPE_CHECKING."""
    return {(name.split(".")[1], line) for name, line in imported_modules(path)}


def imported_modules(path: Path) -> set[tuple[str, int]]:
    """(dotted name within prism_fast, line), likewise."""
    found = set()
    relative = path.relative_to(ROOT).with_suffix("").parts
    package = relative if path.name == "__init__.py" else relative[:-1]
    package = package[:-1] if path.name == "__init__.py" else package
    if package and package[0] in ("kernels", "bench"):
        package = ("prism_fast", *package)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from prism_fast import x` names a part, `from prism_fast.ops import x` already has one.
            names = [f"{base}.{alias.name}" if base == "prism_fast" else base for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "prism_fast" and len(parts) > 1 and parts[1] != "__version__":
                found.add((name, node.lineno))
    return found


def test_imports_are_found_in_all_their_forms(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "prism_fast" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import prism_fast.ops\nfrom prism_fast import models\nfrom ..train.loop import f\n"
        "def g():\n    from prism_fast.report import h\nfrom .grammar import k\nfrom .. import rollout\n"
    )
    assert {p for p, _ in imported_parts(path)} == {"ops", "models", "train", "report", "data", "rollout"}


def test_every_part_has_a_floor():
    parts = {part_of(p) for p in python_files()} - {None, "config", "recipes"}
    assert parts <= set(FLOOR), f"no floor for {parts - set(FLOOR)}"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_never_climb(path):
    part = part_of(path)
    floor = FLOOR.get(part, -1)  # the package itself, config and recipes stand below everything
    settings = {line for name, line in imported_modules(path) if name in SETTINGS} if part == "config" else set()
    for other, line in imported_parts(path):
        if line in settings:
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports prism_fast.{other}"
        if other == part:
            continue
        if other == "config":
            assert part in CONFIG_READERS, f"{where}; only {sorted(CONFIG_READERS)} may, pass plain arguments instead"
        elif other == "released":
            assert str(path.relative_to(ROOT)) in REGISTRIES, f"{where}; only {sorted(REGISTRIES)} may"
        elif other == "recipes":
            assert part in CONFIG_READERS, where
        elif FLOOR[other] == floor:
            assert (part, other) in SIDEWAYS, f"{where}, which stands on the same floor"
        else:
            assert FLOOR[other] < floor, f"{where}, which stands on a higher floor"


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_import_nothing_of_ours_and_no_torch(name):
    """Neither does loading them, with the packages that they are in."""
    assert imported_modules(ROOT / (name.replace(".", "/") + ".py")) == set()
    code = f"import sys, {name}; print(*({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done


def test_ops_need_torch_alone():
    """No file of the ops imports a third package, and importing and using them loads nothing else of ours."""
    allowed = {"torch", "prism_fast", *sys.stdlib_module_names}
    for path in sorted((PACKAGE / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            strangers = {name.split(".")[0] for name in names} - allowed
            assert not strangers, f"{path.relative_to(ROOT)}:{node.lineno} imports {strangers}"
    code = (
        "import sys, torch; from prism_fast import ops;"
        "a = ops.group_advantage(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), weights=[1.0]);"
        "assert a[1] == -a[0] > 0;"
        "print(*{m.split('.')[1] for m in sys.modules if m.startswith('prism_fast.')})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"ops", "kernels", "_C"}


def test_kernels_folder_is_no_package():
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.is_file()] == []
    assert all((p / "__init__.py").is_file() for p in (ROOT / "kernels").iterdir() if p.name != "__pycache__")
    code = "import kernels, sys; sys.exit(getattr(kernels, '__file__', None) is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0  # an empty namespace at most


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): lines
        for p in tracked_files()
        if p.suffix in (".py", ".cpp", ".cu", ".h") and (lines := len(p.read_text().splitlines())) > 500
    }
    assert long == {}


# Written in pieces so that this file passes its own test.
MACHINE = re.compile(
    rb"/(?:(?:wo" + rb"rk|ro" + rb"ot|opt/wh" + rb"eels)\b(?![-.])|ho" + rb"me/[a-z]|Us" + rb"ers/[a-z])"
    rb"|py" + rb"pi\.|download\.py" + rb"torch|files\.python" + rb"hosted"
)


def test_machine_pattern_sees_what_it_should():
    for text in (b"/wo" + b"rk/main/x", b"'/ro" + b"ot'", b"/ho" + b"me/me/.cache", b"//py" + b"pi.example/simple"):
        assert MACHINE.search(text), text
    for text in (b"network/x", b"/usr/bin/env", b"frame/work-in-progress"):
        assert not MACHINE.search(text), text


def test_no_machine_paths_or_package_hosts():
    found = [
        f"{p.relative_to(ROOT)}: {match.group().decode()}"
        for p in tracked_files()
        if p.suffix not in (".png", ".parquet", ".safetensors", ".bin", ".zst")
        for match in [MACHINE.search(p.read_bytes())]
        if match
    ]
    assert found == []
