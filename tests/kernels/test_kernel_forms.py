"""Every form of every Triton kernel, compiled for the cards we name at the real shapes, on a machine without a GPU.

It fits the card's shared memory, spills no registers, computes nothing in double precision, uses the card's matrix
units, and has not grown: instructions of each main loop and of the rest stand in a table. To write the table anew:

    python -m tests.kernels.compile_forms --write
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is the compiler under test")
pytestmark = pytest.mark.timeout(3600)
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "bench" / "model" / "kernel_forms.json"
AGAIN = "python -m tests.kernels.compile_forms --write writes the table anew"
GROWTH = 1.1
UNITS = {80: "HMMA", 90: "HGMMA", 100: "UTC"}  # beginnings of their matrix instructions
# float32 is multiplied exactly, without matrix units; ragged widths and heads of 96 are no model of ours. No paths for
# speed: their kernels may spill the bytes that the table says, no others may spill.
SPILLING = (" fp32 ", " ragged", "x96:")


def run_program(*arguments: str, cache: Path) -> dict:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.compile_forms", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["everyday", pytest.param("whole", marks=pytest.mark.long)])
def found(request, tmp_path_factory) -> dict:
    """What `make test` compiles, the H200's forms in bfloat16, and all there is."""
    arguments = ("--cards", "90", "--everyday") if request.param == "everyday" else ()
    return run_program(*arguments, cache=tmp_path_factory.mktemp("triton")) | {"whole": not arguments}


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads(TABLE.read_text())


def test_every_form_fits_its_card(found):
    assert found["refused"] == []


def test_no_form_spills(found, table):
    def allowed(key: str) -> int:
        return table.get(key, {}).get("spills", 0) if any(part in key for part in SPILLING) else 0

    assert {key: row["spills"] for key, row in found["rows"].items() if row["spills"] > allowed(key)} == {}


def test_no_form_computes_in_double_precision(found):
    assert {key: row["double"] for key, row in found["rows"].items() if row["double"]} == {}


def test_half_precision_products_use_the_matrix_units(found):
    def served(key: str, row: dict) -> bool:
        unit = UNITS[int(key.split()[0].removeprefix("sm_"))]
        return any(name.startswith(unit) for name in row["units"])

    half = {key: row for key, row in found["rows"].items() if row["types"][0] in ("bf16", "fp16") and row["products"]}
    assert half
    assert [key for key, row in half.items() if not served(key, row)] == []


def test_another_number_of_rows_compiles_nothing_anew(found):
    assert found["anew"] == []


def test_every_launch_has_the_device_of_its_operands_current(found):
    assert found["unguarded"] == []


def test_nothing_has_grown(found, table):
    """Of the instructions of a step, of the epilogue and of the whole kernel, none by more than a tenth."""
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table was written with Triton {table['triton']}; this is {triton.__version__}")
    grown, missing = {}, []
    for key, row in found["rows"].items():
        if key not in table:
            missing.append(key)
            continue
        before, now = sizes(table[key]), sizes(row)
        if grows(before, now):
            grown[key] = f"steps, epilogue, total {before} -> {now}"
    gone = sorted(set(table) - {"triton"} - set(found["rows"])) if found["whole"] else []
    assert (grown, missing, gone) == ({}, [], []), f"grown {grown}, not in the table {missing}, gone {gone}; {AGAIN}"


def grows(before: list[int], now: list[int]) -> bool:
    """By more than a tenth in one place. Main loops that share blocks count these twice: epilogues may be negative."""
    return len(before) != len(now) or any(n - b > (GROWTH - 1) * abs(b) for b, n in zip(before, now, strict=True))


@pytest.mark.parametrize(
    ("before", "now", "grown"),
    [
        ([100, 500], [110, 540], False),
        ([100, 500], [112, 500], True),
        ([100, -254, 500], [100, -254, 500], False),
        ([100, -254, 500], [100, -200, 500], True),
        ([100, 500], [100, 20, 500], True),
    ],
)
def test_growth_is_more_than_a_tenth_or_another_number_of_loops(before, now, grown):
    assert grows(before, now) == grown


def sizes(row: dict) -> list[int]:
    return [*row["steps"], row["epilogue"], row["total"]]


def test_the_forms_launch_every_kernel_from_every_site(found):
    """A ``kernel[grid](...)`` in the source that no form reaches is compiled by nobody before a card sees it."""
    sites = {(file, line) for file, line in found["sites"]}
    missed = [
        f"{file}:{first} {name}"
        for file, name, first, last in launch_sites()
        if not any(file == where and first <= line <= last for where, line in sites)
    ]
    assert missed == []


def test_the_forms_take_every_switch_both_ways(found):
    """Each boolean compile-time argument of each kernel is true in one form and false in another."""
    seen = {(kernel, switch, value) for kernel, switch, value in found["switches"]}
    if not found["whole"]:
        pytest.skip("the forms of every day are some of them")
    assert sorted((k, s, not v) for k, s, v in seen if (k, s, not v) not in seen) == []


def launch_sites() -> list[tuple[str, str, int, int]]:
    """(file, kernel, first line, last line) of each launch in the project's code."""
    trees = {p: ast.parse(p.read_text()) for folder in ("kernels", "prism_fast") for p in (ROOT / folder).rglob("*.py")}
    kernels = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value).split(".")[-1]
                if name in kernels:
                    found.append((str(path.relative_to(ROOT)), name, node.lineno, node.end_lineno))
    assert found
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict:
    return run_program("--cards", "90", "--areas", "planted", cache=tmp_path_factory.mktemp("planted"))


def test_an_oversized_tile_is_named_with_what_it_needs_and_the_limit(planted):
    assert len(planted["refused"]) == 2 and len(set(planted["refused"])) == 1  # each time it is launched
    named = planted["refused"][0]
    assert "sm_90 planted bf16 oversized: scores_kernel" in named
    assert "stages=5" in named and "BLOCK_V=256" in named
    needed, limit = map(int, re.search(r"Required: (\d+), Hardware limit: (\d+)", named).groups())
    assert needed > 5 * (128 + 256) * 64 * 2 and limit == 232448


def test_double_precision_spills_recompilation_and_a_forgotten_device_are_seen(planted):
    rows = {key.split()[3].removesuffix(":"): row for key, row in planted["rows"].items()}
    assert rows["double"]["double"] > 30
    assert rows["spilling"]["spills"] > 0 and rows["double"]["spills"] == 0
    assert rows["spilling"]["units"] == ["HMMA"]
    assert len(planted["anew"]) == 1 and "recompiling at 64" in planted["anew"][0]
    assert len(planted["unguarded"]) == 1 and "spilling_kernel" in planted["unguarded"][0]
