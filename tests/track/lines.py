"""Lines as a run writes them: two stages, evaluations behind each, notes between."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

LINES = [
    ("data", 0, {"name": "sft", "before": "sft", "data/kept": 5}),
    ("sft", 1, {"sft/loss": 3.0, "passes/policy_learned": 2, "sft/phase": "plain"}),
    ("sft", 2, {"sft/loss": 2.0, "passes/policy_learned": 2, "sft/val_loss": 2.5}),
    ("sft", 3, {"sft/loss": 1.0, "passes/policy_learned": None}),
    ("eval", 3, {"after": "sft", "eval/accuracy": 0.25}),
    ("stage", 0, {"name": "sft", "time/seconds": 1.5}),
    ("warmup", 0, {"pairs/kept": 7}),
    ("warmup", 1, {"warmup/loss": 0.5, "perf/tokens_per_second": 10.0}),
    ("stage", 0, {"name": "warmup", "time/seconds": 1.5}),
    ("align", 1, {"disc/loss": 0.75, "policy/loss": 0.125, "time/update": 0.5}),
    ("align", 2, {"disc/loss": 0.5, "policy/loss": 0.25, "time/update": 0.5}),
    ("eval", 6, {"after": "align", "eval/accuracy": 0.5}),
    ("stage", 0, {"name": "align", "time/seconds": 1.5}),
]
# What views show of them: (global step, value) by tag.
CURVES = {
    "sft/loss": [(1, 3.0), (2, 2.0), (3, 1.0)],
    "sft/passes/policy_learned": [(1, 2.0), (2, 2.0)],
    "sft/val_loss": [(2, 2.5)],
    "eval/accuracy": [(3, 0.25), (6, 0.5)],
    "warmup/pairs/kept": [(3, 7.0)],
    "warmup/loss": [(4, 0.5)],
    "warmup/perf/tokens_per_second": [(4, 10.0)],
    "align/disc/loss": [(5, 0.75), (6, 0.5)],
    "align/policy/loss": [(5, 0.125), (6, 0.25)],
    "align/time/update": [(5, 0.5), (6, 0.5)],
}


def write(tracker, lines=LINES) -> None:
    for line in lines:
        tracker.write(*line)


def bytes_of(folder: Path) -> list[int]:
    """Size of the record after each line, from before the first."""
    return [0, *accumulate(len(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True))]
