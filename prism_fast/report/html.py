"""Writes ``report.html``: one file that needs no network, from the present content of the run directory.

The template escapes all text of models and data sets; a content security policy in the page allows only the two
embedded scripts (by their hashes) and no connection, so that text would not run even if an escape failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from prism_fast.models.writing import write_whole
from prism_fast.report import experts, figures, samples
from prism_fast.report.rundir import TRAINED, RunDirectory, read_run
from prism_fast.report.speed import speed_of
from prism_fast.report.statistics import ENOUGH, Difference
from prism_fast.report.summary import (
    ABSENT,
    CONTROLS,
    NAMES,
    RESAMPLES,
    SEED,
    Summary,
    count,
    duration,
    no_interval,
    p_value,
    points,
    stage_name,
    summarise,
    updates,
    verdicts,
    wall,
)

SILENT_AFTER = 600.0  # seconds without a write after which an unfinished run counts as dead


def write_report(run_dir: str | Path, *, now: float | None = None) -> Path:
    """Write ``report.html`` into the run directory, replacing an older one, and return its path.

    A finished run gives the same bytes every time. For an unfinished one ``now`` (seconds since the epoch, default: the
    clock) decides between running and dead: `SILENT_AFTER` seconds without a write.

    Raises:
        FileNotFoundError, ValueError: as in `read_run`, or an image of the run is not a PNG.
    """
    run = read_run(run_dir)
    page = render(run, time.time() if now is None else now)
    path = run.path / "report.html"
    write_whole(path, page)
    return path


def render(run: RunDirectory, now: float) -> str:
    """The page as text."""
    summary = summarise(run)
    problems = list(run.problems)
    drawings: dict[str, Any] = {}

    def figure(name: str, value: dict[str, Any]) -> str:
        drawings[name] = value
        return name

    effects = figures.difference_figure(summary)
    stages = [_stage(run, stage, figure) for stage in _shown_stages(run)]
    groups = [_group(run, group, problems) for group in samples.choose_groups(run, problems)]
    script, plotly = _asset("report.js"), get_plotlyjs()
    context = {
        "header": _header(run, now),
        "verdicts": verdicts(run, summary),
        "rows": [_row(summary, stage, run) for stage in _shown_stages(run) if stage != "warmup"],
        "controls": [(name, stage_name(name)) for name in CONTROLS],
        "kinds": [(kind, [_kind_cell(entry, kind) for entry in summary.stages]) for kind in summary.kinds],
        "evaluated": [stage_name(entry.stage) for entry in summary.stages],
        "accuracy_figure": figure("accuracy", figures.accuracy_figure(summary)) if summary.stages else None,
        "difference_figure": figure("difference", effects) if effects is not None else None,
        "stages": stages,
        "speeds": [found for stage in _shown_stages(run) if (found := speed_of(run, stage)) is not None],
        "groups": groups,
        "group_stages": list(dict.fromkeys((group["stage"], group["name"]) for group in groups)),
        "seed": SEED,
        "enough": ENOUGH,
        "resamples": f"{RESAMPLES:,}",
        "config": None if run.config is None else yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "notes": list(dict.fromkeys([*summary.notes, *problems])),
        "style": _asset("report.css"),
        "script": script,
        "plotly": plotly,
        "figures": json_for_script(drawings),
        "script_hashes": " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script)),
    }
    environment = Environment(
        autoescape=True, finalize=_printable, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html.j2")).render(context)


def _asset(name: str) -> str:
    return resources.files("prism_fast.report").joinpath("assets", name).read_text(encoding="utf-8")


def _printable(value: Any) -> Any:
    """Make a value of the template printable, before escaping; values marked safe are our own and unchanged."""
    return samples.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def json_for_script(value: Any) -> str:
    """JSON that cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown_stages(run: RunDirectory) -> list[str]:
    """Planned stages and stages with files, in the order of a run."""
    present = set(run.planned) | set(run.steps) | set(run.evals)
    return [*(stage for stage in TRAINED if stage in present), *sorted(present - set(TRAINED))]


def _header(run: RunDirectory, now: float) -> dict[str, Any]:
    config = run.config or {}
    facts = [(key, config[key]) for key in ("recipe", "seed", "semantics", "device") if config.get(key) is not None]
    facts += list(run.environment.items())
    spent = sum(run.finished.values())
    facts.append(("wall time of finished stages", duration(spent) if run.finished else "no stage has finished"))
    state, detail = _state(run, now)
    return {"title": str(config.get("recipe", run.path.name)), "facts": facts, "state": state, "detail": detail}


def _state(run: RunDirectory, now: float) -> tuple[str, str]:
    if run.complete:
        return "complete", "every planned stage has finished" if run.planned else "an evaluation without training"
    last = run.last_written()
    written = "" if last is None else datetime.fromtimestamp(last, UTC).strftime("; last write %Y-%m-%d %H:%M:%S UTC")
    reached = next((stage for stage in reversed(_shown_stages(run)) if stage in run.steps), None)
    where = (
        "before its first step"
        if reached is None
        else f"in or after {stage_name(reached)}, step {run.steps[reached][-1]['step']}"
    )
    if last is not None and now - last <= SILENT_AFTER:
        return "running", f"{where}{written}"
    return (
        "dead",
        f"stopped {where}{written}; nothing was written for {SILENT_AFTER / 60:.0f} minutes before this page was made",
    )


def _row(summary: Summary, stage: str, run: RunDirectory) -> dict[str, Any]:
    entry = summary.stage(stage)
    if entry is None:
        reason = "trained, not evaluated yet" if stage in run.steps else "has not run"
        return {
            "name": stage_name(stage),
            "missing": reason,
            "color": figures.STAGE_COLOURS.get(stage, figures.COLOURS[3]),
        }
    against = []
    for control in CONTROLS:
        difference = entry.against.get(control)
        against.append(None if difference is None else _difference_cell(difference))
    return {
        "name": stage_name(stage),
        "missing": None,
        "color": figures.STAGE_COLOURS.get(stage, figures.COLOURS[3]),
        "accuracy": f"{100 * entry.accuracy.mean:.1f}",
        "interval": _interval_text(entry.accuracy),
        "against": against,
        "format": f"{100 * entry.format_rate:.1f}",
        "length": f"{entry.mean_length:.1f}",
        "truncated": None if entry.truncated is None else f"{100 * entry.truncated:.1f}",
        "count": entry.accuracy.items,
        "images": entry.accuracy.clusters,
        "updates": count(entry.updates),
        "seconds": wall(entry.seconds),
        "arm_rollouts": ABSENT if entry.arm is None else count(entry.arm.rollouts),
        "arm_seconds": ABSENT if entry.arm is None else wall(entry.arm.seconds),
    }


def _difference_cell(difference: Difference) -> dict[str, str]:
    return {
        "points": points(difference),
        "p": p_value(difference.p),
        "why": no_interval(difference),
        "tone": ("down", "flat", "up")[difference.direction + 1],
    }


def _interval_text(accuracy: Any) -> str:
    if accuracy.interval is None:
        return "no interval: one image"
    return f"{100 * accuracy.interval.low:.1f} to {100 * accuracy.interval.high:.1f}"


def _kind_cell(entry: Any, kind: str) -> dict[str, Any] | None:
    accuracy = entry.kinds.get(kind)
    if accuracy is None:
        return None
    return {"accuracy": f"{100 * accuracy.mean:.1f}", "interval": _interval_text(accuracy), "count": accuracy.items}


def _stage(run: RunDirectory, stage: str, figure: Any) -> dict[str, Any]:
    drawn = figures.stage_curves(run, stage)
    made, spent = updates(run, stage), run.finished.get(stage)
    facts = [] if made is None else [f"{made} updates"]
    facts += [] if spent is None else [f"{duration(spent)} wall time"]
    charts = [
        {"id": figure(f"{stage}-{index}", value), "title": chart.title, "note": chart.note}
        for index, (chart, value) in enumerate([*drawn.charts, *experts.expert_charts(run, stage)])
    ]
    ran = stage in run.steps
    return {
        "id": stage,
        "name": stage_name(stage),
        "known": stage in NAMES,
        "ran": ran,
        "facts": ", ".join(facts),
        "charts": charts,
        "absent": drawn.absent if ran else (),
        "extra": [key for key in drawn.extra if not experts.is_expert_metric(key)],
    }


def _group(run: RunDirectory, group: samples.Group, problems: list[str]) -> dict[str, Any]:
    first = group.first
    images = [samples.picture(run, digest, problems) for digest in first.get("images") or ()]
    teacher = first.get("teacher") or {}
    return {
        "stage": group.stage,
        "name": stage_name(group.stage),
        "step": group.step,
        "uid": first.get("uid"),
        "kind": first.get("kind"),
        "question": first.get("question"),
        "ground_truth": first.get("ground_truth"),
        "images": [image for image in images if image is not None],
        "lost_images": sum(image is None for image in images),
        "teacher": [(name, teacher[name]) for name in ("caption", "reasoning") if teacher.get(name)],
        "teacher_scores": _numbers(first.get("teacher_scores")),
        "rollouts": [_rollout(record) for record in group.rollouts],
        "total": group.total,
    }


def _rollout(record: dict[str, Any]) -> dict[str, Any]:
    pieces, warning = samples.segments(record["text"], record.get("spans"))
    advantage = record.get("advantage")
    reward = dict(record.get("reward") or {})
    decided_by, parts = reward.pop("decided_by", None), reward.pop("parts", None) or {}
    tokens = record.get("tokens")
    footer = [] if tokens is None else [f"{tokens} tokens"]
    footer += [] if decided_by is None else [f"answer decided by {decided_by}"]
    return {
        "pieces": pieces,
        "warning": warning,
        "valid": record.get("valid"),
        "footer": ", ".join(footer),
        "finish": record.get("finish"),
        "scores": _numbers(record.get("scores")),
        "reward": _numbers({"reward" if name == "score" else name: value for name, value in reward.items()} | parts),
        "advantage": None if advantage is None else f"{advantage:+.2f}".replace("-", "\u2212"),
        "tone": "flat" if not advantage else "up" if advantage > 0 else "down",
    }


def _numbers(values: dict[str, Any] | None) -> Sequence[tuple[str, str]]:
    """Numbers of a dump with two digits; texts (which rule decided) are unchanged."""
    return [
        (name.replace("_", " "), value if isinstance(value, str) else f"{value:.2f}".replace("-", "\u2212"))
        for name, value in (values or {}).items()
        if value is not None
    ]
