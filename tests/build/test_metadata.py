"""What the package declares: dependencies match imports, versions match pins, files travel."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import prism_fast
from tests.build.surface import LIST, surface

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Name on import -> name of the distribution, where they differ.
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "text_to_num": "text2num", "yaml": "pyyaml"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", r).group()) for r in requirements}


def imported() -> dict[str, str]:
    """Distribution -> one file that imports it, for the installed package."""
    found = {}
    for folder in ("prism_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module]
                for module in (m.split(".")[0] for m in modules):
                    if module not in sys.stdlib_module_names and module not in ("prism_fast", "__future__"):
                        found[canonical(DISTRIBUTION.get(module, module))] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_declared():
    extras = names([r for group in PROJECT["optional-dependencies"].values() for r in group])
    missing = {k: v for k, v in imported().items() if k not in names(PROJECT["dependencies"]) | extras}
    assert missing == {}


def imported_at_the_top(folder: Path) -> dict[str, str]:
    """Distribution -> place, for what is imported as soon as a module is."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in (m.split(".")[0] for m in modules):
                if module not in sys.stdlib_module_names and module not in ("prism_fast", "__future__"):
                    found[canonical(DISTRIBUTION.get(module, module))] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_the_ops_need_torch_alone():
    assert names(PROJECT["dependencies"]) == {"torch"}
    assert set(imported_at_the_top(ROOT / "kernels")) == {"torch", "triton"}  # torch brings Triton where it serves


def test_other_extras_are_not_needed_to_import_the_trainer():
    core = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["train"])
    assert {k: v for k, v in imported_at_the_top(ROOT / "prism_fast").items() if k not in core} == {}


def test_pins_cover_the_core_and_name_no_place():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", x) for x in lines), lines
    free = {"torch", "triton"}  # chosen in the Makefile
    extras = PROJECT["optional-dependencies"]
    wanted = names([*PROJECT["dependencies"], *extras["train"], *extras["test"], *extras["docs"]])
    assert wanted - free - names(lines) == set()


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", prism_fast.__version__)
    assert "version" in PROJECT["dynamic"]


def test_example_of_the_readme_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"# (tensor\(.*\))", code).group(1)


def test_public_names_and_signatures_are_those_of_the_list():
    """A change that is meant: ``python -m tests.build.surface --write``."""
    assert surface() == LIST.read_text().splitlines()


def test_package_init_stays_tiny():
    assert len((ROOT / "prism_fast" / "__init__.py").read_text().splitlines()) <= 5
