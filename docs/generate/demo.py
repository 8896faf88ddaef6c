"""The demo's table and picture, from its file of record. Write the picture anew: ``python -m docs.generate.demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "demo.svg"
RECORD = json.loads((ROOT / "bench" / "results" / "record-demo-cpu-2026-12-01.json").read_text())
ARMS = {
    "sft": ("SFT", "#3b82d6"),
    "sft_continued": ("SFT continued", "#8b949e"),
    "align": ("alignment", "#e08a1e"),
    "rlvr": ("alignment, then RLVR (PRISM)", "#1f9e77"),
    "rlvr_direct": ("RLVR from SFT, no alignment", "#8a79d6"),
}
LOW, HIGH = 40, 90  # per cent, of the axis
WIDTH, LEFT, ROW, TOP = 760, 230, 40, 46


def table() -> str:
    """Accuracy by seed and arm in Markdown; the difference is PRISM's against RLVR from SFT, in points."""
    head = "| seed | SFT | SFT continued | alignment | PRISM | RLVR from SFT | PRISM − RLVR from SFT |"
    lines = [head, "|" + "---|" * 7]
    for seed in RECORD["seeds"]:
        points = {name: 100 * value for name, value in seed["rlvr - rlvr_direct"].items()}
        difference = "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**points).replace("-", "−")
        cells = [str(seed["seed"]), *(f"{_accuracy(seed, arm):.1f}" for arm in ARMS), difference]
        lines.append(f"| {' | '.join(cells)} |")
    differences = [seed["rlvr - rlvr_direct"]["mean"] for seed in RECORD["seeds"]]
    cells = [f"{sum(_accuracy(seed, arm) for seed in RECORD['seeds']) / len(differences):.1f}" for arm in ARMS]
    mean = f"{100 * sum(differences) / len(differences):+.1f}".replace("-", "−")
    return "\n".join([*lines, f"| mean | {' | '.join(cells)} | {mean} |"])


def picture() -> str:
    """An SVG: one row per arm, one dot per seed, a bar at their mean."""
    height = TOP + ROW * len(ARMS) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-size="15" font-weight="bold" fill="#1f2328">'
        f"Held-out accuracy on digits, {len(RECORD['seeds'])} seeds (%)</text>",
    ]
    bottom = TOP + ROW * len(ARMS)
    for tick in range(LOW, HIGH + 1, 10):
        lines.append(f'<line x1="{_x(tick):.1f}" y1="{TOP}" x2="{_x(tick):.1f}" y2="{bottom}" stroke="#d8dee4"/>')
        lines.append(f'<text x="{_x(tick):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#57606a">{tick}</text>')
    for number, (arm, (name, colour)) in enumerate(ARMS.items()):
        middle = TOP + ROW * number + ROW / 2
        values = [_accuracy(seed, arm) for seed in RECORD["seeds"]]
        mean = sum(values) / len(values)
        lines.append(f'<text x="{LEFT - 12}" y="{middle + 5}" text-anchor="end" fill="#1f2328">{name}</text>')
        lines += [f'<circle cx="{_x(v):.1f}" cy="{middle}" r="6" fill="{colour}" fill-opacity="0.75"/>' for v in values]
        lines.append(
            f'<line x1="{_x(mean):.1f}" y1="{middle - 14}" x2="{_x(mean):.1f}" y2="{middle + 14}" stroke="#1f2328" '
            'stroke-width="2"/>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _accuracy(seed: dict[str, Any], arm: str) -> float:
    return 100 * seed[arm]["right"] / seed[arm]["items"]


def _x(accuracy: float) -> float:
    return LEFT + (WIDTH - LEFT - 24) * (accuracy - LOW) / (HIGH - LOW)


if __name__ == "__main__":
    PICTURE.write_text(picture())
