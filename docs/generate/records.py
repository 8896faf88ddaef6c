"""Measured results, from the files of record in `bench/results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.generate import demo

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
HEAD = """# Measured results

Everything on this page comes from files of record in `bench/results/`, or names the command that repeats it. Nothing
has been measured on a GPU yet: [what waits](unmeasured.md).

## The demo

`make demo` trains a tiny Qwen3-VL through all stages and prints a table of held-out accuracy with the rollouts and the
time of each arm. Five seeds of its recipe, 1,005 held-out items each, {command}; the difference is in points, with its
interval over images at 95 %:

![Accuracy of each arm and seed](demo.svg)

{demo}

PRISM is alignment and then RLVR, 30 updates each, and samples 11,648 responses; RLVR from SFT has 60 updates and
samples 15,360. The settings that were tried are in the [design notes](design-notes.md#digits).

## One alignment step

`prism-fast bench step` times one alignment step in three columns over the same weights and rollouts: the published
schedule with stock kernels, the published schedule with our kernels, and this trainer. Losses and the gradient of every
parameter are compared in float32 in the same run; the last column is the largest difference that was found. "Against
stock" and "against kernels" are the time of the published schedule, with stock and with our kernels, divided by the
time of the line's column: 8 means eight times as fast. Ratios are medians over rounds in which the columns take turns.
"""
HEAD_OF_STEP = (
    "| column | step ms | against stock | against kernels | tokens | TFLOP | peak MiB | difference |\n|" + "---|" * 8
)


def page() -> str:
    """The Markdown page."""
    lines = [HEAD.format(demo=demo.table(), command=f"`{demo.RECORD['command']}`")]
    for path in sorted(RESULTS.glob("record-*.json")):
        record = json.loads(path.read_text())
        record = record["data"] if "section" in record else record  # of a section of gpu_suite.sh
        if record.get("kind") == "demo":  # at the head of the page
            continue
        if "teacher" in record["rows"][0]:
            lines += _step(path.name, record)
        elif "column" in record["rows"][0]:
            lines += _train(path.name, record)
        else:
            lines += _ops(path.name, record)
    return "\n".join(lines) + "\n"


def machine(about: dict[str, Any]) -> str:
    """One line on the machine of a record."""
    place = about["card"] or f"{about['processor']}, {about['threads']} threads"
    return f"{place}; torch {about['torch']}, Python {about['python']}, {about['date']}, load {about['load']:.1f}"


def _step(name: str, record: dict[str, Any]) -> list[str]:
    size = "tiny models" if record["depth"] is None else f"{record['depth']} layers of the real widths"
    lines = [f"### `{name}`", "", f"{machine(record['machine'])}; {size}, {record['dtype']}. Medians.", ""]
    sizes = None
    for row in record["rows"]:
        if sizes != (sizes := [row[name] for name in ("prompt", "response", "teacher", "rollouts")]):
            lines += ["", "Prompt {} tokens, response {}, teacher {}, {} rollouts:".format(*sizes), "", HEAD_OF_STEP]
        counts = row["counts"].values()
        cells = [row["column"], _number(row["ms_p50"].get("step"), ".0f") if row["status"] == "ok" else row["status"]]
        cells += [_number(row["of_stock"], ".2f"), _number(row["of_kernels"], ".2f")]
        cells += [f"{sum(c['tokens'] + c['tokens_no_grad'] for c in counts):,.0f}"]
        cells += [f"{sum(c['flop'] for c in counts) / 1e12:.3f}", _number(row["peak_mib"], ".0f")]
        cells += [f"{max(row['errors'].values()):.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _train(name: str, record: dict[str, Any]) -> list[str]:
    """An update of the policy beside TRL's."""
    size = "tiny policy" if record["depth"] is None else f"{record['depth']} layers of the real widths"
    first = record["rows"][0]
    lines = [f"### `{name}`", "", f"{machine(record['machine'])}; {size}, {record['dtype']}. One GRPO update.", ""]
    lines += [f"Prompt {first['prompt']} tokens, response {first['response']}, {first['rollouts']} rollouts:", ""]
    lines += ["| column | ms | response tokens/s | TRL / it | peak MiB | loss | difference |", "|" + "---|" * 7]
    for row in record["rows"]:
        cells = [row["column"], _number(row["ms_p50"], ".0f") if row["status"] == "ok" else row["status"]]
        cells += [_number(row["response_tokens_per_second"], ",.0f"), _number(row["of_trl"], ".2f")]
        cells += [_number(row["peak_mib"], ".0f"), _number(row["loss"], ".6f")]
        cells += [_number(max(row["errors"].values(), default=None), ".1e")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _ops(name: str, record: dict[str, Any]) -> list[str]:
    lines = [f"### `{name}`", "", f"Ops. {machine(record['machine'])}. Median time of forward and backward.", ""]
    lines += ["| op | shape | dtype | provider | ms | of eager | peak MiB | error |", "|" + "---|" * 8]
    for row in record["rows"]:
        if row["mode"] == "full":
            cells = [row["op"], row["shape"], row["dtype"], row["provider"]]
            cells += [_number(row["ms_p50"], ".3f") if row["status"] == "ok" else row["status"]]
            cells += [_number(row["of_eager"], ".2f"), _number(row["peak_mib"], ".0f"), _number(row["error"], ".1e")]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
