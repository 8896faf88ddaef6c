"""The stage table that ends a run in the terminal: stages as columns, so that it fits 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from prism_fast.report.rundir import read_run
from prism_fast.report.samples import visible
from prism_fast.report.statistics import ENOUGH, Difference
from prism_fast.report.summary import ABSENT, CONTROLS, Accuracy, count, p_value, points, stage_name, summarise, wall

# Short: the table must fit 80 columns.
_CONTROL_LABELS = {"sft": "vs SFT", "sft_continued": "vs continued", "rlvr_direct": "vs RLVR from SFT"}

_INTERVALS = (
    "[ ]: 95 % intervals that count held-out images, not items; differences are paired, in percentage points; "
    f"where fewer than {ENOUGH} images differ, the exact p of a sign-flip test stands for an interval"
)


def stage_table(run_dir: str | Path) -> Table:
    """Held-out results after each evaluated stage.

    Per stage: accuracy with its 95 % interval, accuracy per question kind, format rate, mean length, updates, wall
    time, the paired differences to SFT and to the controls, and the cost of everything behind SFT.

    Raises:
        FileNotFoundError, ValueError: as in `read_run`.
    """
    run = read_run(run_dir)
    summary = summarise(run)
    notes = [*summary.notes, *run.problems]
    if not summary.stages:
        table = Table(title="Held-out results after each stage", caption=_caption(notes))
        table.add_column(Text("No stage of this run has been evaluated."))
        return table
    table = Table(title="Held-out results after each stage", caption=_caption([_INTERVALS, *notes]))
    table.add_column("")
    for entry in summary.stages:
        table.add_column(Text(visible(stage_name(entry.stage))), justify="right")

    def row(label: str, cells: list[str]) -> None:
        # Names come from data: never markup, never control characters of the terminal.
        table.add_row(*(Text(visible(cell)) for cell in (label, *cells)))

    stages = summary.stages
    row("accuracy, %", [_accuracy(entry.accuracy, interval=True) for entry in stages])
    for control in CONTROLS:
        if any(control in entry.against for entry in stages):
            row(_CONTROL_LABELS[control], [_difference(entry.against.get(control)) for entry in stages])
    table.add_section()
    for kind in summary.kinds:
        row(kind, [_accuracy(entry.kinds.get(kind), interval=False) for entry in stages])
    table.add_section()
    row("format, %", [f"{100 * entry.format_rate:.1f}" for entry in stages])
    row("tokens", [f"{entry.mean_length:.1f}" for entry in stages])
    row("items", [str(entry.accuracy.items) for entry in stages])
    row("updates", [count(entry.updates) for entry in stages])
    row("wall time", [wall(entry.seconds) for entry in stages])
    arms = [entry.arm for entry in stages]
    if any(arms):
        table.add_section()
        row("behind SFT:", [""] * len(stages))
        row("updates", [ABSENT if arm is None else count(arm.updates) for arm in arms])
        row("rollouts", [ABSENT if arm is None else count(arm.rollouts) for arm in arms])
        row("time", [ABSENT if arm is None else wall(arm.seconds) for arm in arms])
    return table


def _accuracy(accuracy: Accuracy | None, *, interval: bool) -> str:
    if accuracy is None:
        return ABSENT
    text = f"{100 * accuracy.mean:.1f}"
    if not interval:
        return text
    if accuracy.interval is None:
        return f"{text}\nno interval"
    return f"{text}\n[{100 * accuracy.interval.low:.1f},\n{100 * accuracy.interval.high:.1f}]"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ABSENT
    text = points(difference).replace(" ", "\n")
    return text if difference.interval is not None else f"{text}\n{p_value(difference.p)}"


def _caption(lines: list[str]) -> Text | None:
    return Text(visible("\n".join(lines)), style="dim") if lines else None
