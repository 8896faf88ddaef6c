"""Compiles every form of `tests.kernels.forms` and prints what the machine code says, as JSON.

A program for processes of its own (the recording driver is global, TRITON_INTERPRET must be unset):

    python -m tests.kernels.compile_forms --write              # all of it, and writes the table: a few minutes
    python -m tests.kernels.compile_forms --cards 90 --everyday

The table (`TABLE`) has a line per kernel: form, kernel and switches; instructions per warp of a step of each main loop,
of the epilogue and in all; registers per thread, bytes of shared memory, bytes of spills; sizes, warps, stages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor

import triton
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from tests.kernels.forms import AREAS
from tests.support.fake_card import fake_card
from tests.support.triton_aot import MAX_SHARED, ROOT, Compiled, RecordingDriver

TABLE = ROOT / "bench" / "model" / "kernel_forms.json"
CARDS = tuple(MAX_SHARED)


def compile_area(card: int, area: str, everyday: bool) -> dict:
    """What the forms of an area give on a card: rows of the table, launch sites, switches, and what is wrong."""
    driver = RecordingDriver(card)
    driver.install()
    found = {"rows": {}, "sites": [], "switches": [], "refused": [], "anew": [], "unguarded": []}
    named: dict[int, str] = {}  # by identity of what was compiled
    for form in importlib.import_module(f"tests.kernels.forms.{area}").forms():
        if card not in form.cards or everyday > form.everyday:
            continue
        for size in form.sizes:
            driver.launches.clear()
            try:
                with fake_card(card):
                    form.run(size)
            except OutOfResources as error:
                found["refused"].append(refusal(f"sm_{card} {area} {form.name}", error))
            for launch in driver.launches:
                c = launch.compiled
                if id(c) not in named:
                    if size != form.sizes[0]:
                        found["anew"].append(f"sm_{card} {area} {form.name} at {size}: {c.kernel} {' '.join(c.flags)}")
                    named[id(c)] = key = key_of(card, area, form.name, c, found["rows"])
                    found["rows"][key] = row_of(c)
                    print(key, json.dumps(row_of(c)), file=sys.stderr)
                found["sites"].append([launch.file, launch.line])
                found["switches"] += [[c.kernel, n, v] for n, v in c.constants.items() if isinstance(v, bool)]
                if not launch.guarded:
                    found["unguarded"].append(f"{launch.file}:{launch.line} {c.kernel} in {form.name}")
    for name in ("sites", "switches", "unguarded"):
        found[name] = sorted({json.dumps(x): x for x in found[name]}.values())
    return found


def key_of(card: int, area: str, form: str, c: Compiled, rows: dict) -> str:
    """A kernel stands under the first form that launches it; several of one name are numbered as they are launched."""
    key = " ".join((f"sm_{card} {area} {form}:", c.kernel, *c.flags))
    number = 1 + sum(other == key or other.startswith(f"{key} #") for other in rows)
    return key if number == 1 else f"{key} #{number}"


def row_of(c: Compiled) -> dict:
    return {
        "steps": list(c.steps),
        "epilogue": c.epilogue,
        "total": c.total,
        "registers": c.registers,
        "shared": c.shared,
        "spills": c.spills,
        "double": len(c.double),
        "products": c.products,
        "units": list(c.units),
        "types": list(c.dtypes),
        "sizes": c.sizes,
        "warps": c.warps,
        "stages": c.stages,
    }


def refusal(where: str, error: OutOfResources) -> str:
    """Names the kernel that the card would refuse, its sizes, what it needs and the limit."""
    frames = traceback.walk_tb(error.__traceback__)
    compiled = next(k for frame, _ in frames if isinstance(k := frame.f_locals.get("kernel"), CompiledKernel))
    src, metadata = compiled.src, compiled.metadata
    constants = " ".join(f"{src.fn.arg_names[place[0]]}={value}" for place, value in src.constants.items())
    return f"{where}: {src.fn.__name__} warps={metadata.num_warps} stages={metadata.num_stages} {constants}: {error}"


def compile_forms(cards: list[int], areas: list[str], everyday: bool, jobs: int) -> dict:
    """`compile_area` of all, several at a time, in one."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with pool:
        work = [pool.submit(compile_area, card, area, everyday) for card in cards for area in areas]
        parts = [w.result() for w in work]
    whole = {"triton": triton.__version__}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "rows":
            whole[name] = {key: row for rows in values for key, row in rows.items()}
        else:
            whole[name] = [x for some in values for x in some]
    return whole


def table_text(triton_version: str, rows: dict) -> str:
    """One line per kernel, sorted."""
    lines = [f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)]
    return "{\n" + ",\n".join([f'  "triton": "{triton_version}"', *lines]) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=CARDS, choices=CARDS)
    parser.add_argument("--areas", nargs="+", default=AREAS)
    parser.add_argument("--everyday", action="store_true", help="only the forms that `make test` compiles")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table; what was not compiled keeps its lines")
    options = parser.parse_args()
    found = compile_forms(options.cards, options.areas, options.everyday, options.jobs)
    if options.write:
        if found["refused"]:
            raise SystemExit("\n".join(found["refused"]))
        kept = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        kept.pop("triton", None)
        again = tuple(f"sm_{card} {area} " for card in options.cards for area in options.areas)
        if not options.everyday:
            kept = {key: row for key, row in kept.items() if not key.startswith(again)}
        TABLE.write_text(table_text(found["triton"], kept | found["rows"]))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
