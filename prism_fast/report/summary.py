"""Results per stage for the table and the report: accuracies with intervals, paired differences, updates, wall time.

The sentences of the report that state a result are also made here, from these results alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_fast.report.charts import SCORED
from prism_fast.report.rundir import EVALUATED, RunDirectory
from prism_fast.report.statistics import ENOUGH, Difference, Interval, accuracy_interval, paired_difference

ABSENT = "–"  # in place of a figure that the run does not have
RESAMPLES = 2000
SEED = 0  # of every bootstrap: the same run directory always gives the same results
NAMES = {
    "sft": "SFT",
    "sft_continued": "SFT continued",
    "rlvr_direct": "RLVR from SFT",
    "warmup": "Discriminator warm-up",
    "align": "Alignment",
    "rlvr": "RLVR",
}
CONTROLS = ("sft", "sft_continued", "rlvr_direct")  # stages that the others are compared with
_ARMS = {  # by the stage that ends it: the stages behind SFT that led to its policy
    "sft_continued": ("sft_continued",),
    "rlvr_direct": ("rlvr_direct",),
    "align": ("warmup", "align"),
    "rlvr": ("warmup", "align", "rlvr"),
}
_LOSS = {
    "sft": "sft/loss",
    "sft_continued": "sft/loss",
    "rlvr_direct": "policy/loss",
    "warmup": "warmup/loss",
    "align": "policy/loss",
    "rlvr": "policy/loss",
}


_RLVR = ("rlvr_direct", "rlvr")  # stages of which a step may have several updates


@dataclass(frozen=True)
class Accuracy:
    """Share of correct items of ``clusters`` images. ``interval`` is None where there are fewer than two."""

    items: int
    clusters: int
    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Cost:
    """Cost of everything behind SFT that led to a policy, the discriminator's warm-up included; None where the run has
    not logged it."""

    updates: int | None  # of the policy
    rollouts: int | None  # sampled from the policy, those of the warm-up's pairs included
    seconds: float | None  # wall-clock, without evaluations

    def in_words(self) -> str:
        return f"{count(self.updates)} updates, {count(self.rollouts)} rollouts, {wall(self.seconds)}"


@dataclass(frozen=True)
class StageSummary:
    """One evaluated stage. ``against`` holds the paired differences to the controls that have the same items."""

    stage: str
    accuracy: Accuracy
    kinds: dict[str, Accuracy]
    format_rate: float
    mean_length: float  # tokens
    truncated: float | None  # share of answers cut at the length limit
    updates: int | None
    seconds: float | None  # wall-clock, evaluation included; None until the stage has ended
    arm: Cost | None  # None for SFT, which the arms share
    against: dict[str, Difference]


@dataclass(frozen=True)
class Summary:
    stages: tuple[StageSummary, ...]
    kinds: tuple[str, ...]
    notes: tuple[str, ...]  # why something is not compared, in words

    def stage(self, name: str) -> StageSummary | None:
        return next((entry for entry in self.stages if entry.stage == name), None)


def stage_name(stage: str) -> str:
    return NAMES.get(stage, stage)


def summarise(run: RunDirectory) -> Summary:
    """Summary of every stage that has an evaluation on disk. Pure: the same run directory gives the same summary."""
    notes: list[str] = []
    stages = []
    for stage in run.evaluated:
        items = run.evals[stage]
        _check_against_log(run, stage, items, notes)
        against = {}
        for control in CONTROLS:
            if control != stage and control in run.evals and EVALUATED.index(control) < _rank(stage):
                difference = _difference(run, stage, control, notes)
                if difference is not None:
                    against[control] = difference
        kinds = sorted({str(item["kind"]) for item in items})
        finish = [item["finish"] for item in items if "finish" in item]
        stages.append(
            StageSummary(
                stage=stage,
                accuracy=_accuracy(items),
                kinds={kind: _accuracy([item for item in items if str(item["kind"]) == kind]) for kind in kinds},
                format_rate=_mean([item["format"] for item in items]),
                mean_length=_mean([item["length"] for item in items]),
                truncated=_mean([reason == "length" for reason in finish]) if len(finish) == len(items) else None,
                updates=updates(run, stage),
                seconds=run.finished.get(stage),
                arm=_cost(run, stage),
                against=against,
            )
        )
    names = tuple(sorted({kind for entry in stages for kind in entry.kinds}))
    return Summary(tuple(stages), names, tuple(notes))


def updates(run: RunDirectory, stage: str) -> int | None:
    """Number of optimizer updates: those of the steps that logged the stage's training loss."""
    series = run.series(stage, _LOSS.get(stage, ""))
    if series is None:
        return None
    # The last step number, not the count of lines: a stage may log its loss every few steps only.
    steps = series.steps[-1] + (1 if series.steps[0] == 0 else 0)
    rlvr = (run.config or {}).get("rlvr")
    return steps * rlvr.get("updates_per_step", 1) if stage in _RLVR and isinstance(rlvr, dict) else steps


def _cost(run: RunDirectory, stage: str) -> Cost | None:
    if stage not in _ARMS:
        return None
    arm = [name for name in _ARMS[stage] if name in run.steps]
    return Cost(
        updates=_sum([updates(run, name) for name in arm if name != "warmup"]),
        rollouts=_sum([_rollouts(run, name) for name in arm]),
        seconds=_sum([_seconds(run, name) for name in arm]),
    )


def _rollouts(run: RunDirectory, stage: str) -> int | None:
    """Responses sampled in a stage; None where it samples some and has not logged how many."""
    if stage == "sft_continued":
        return 0
    if stage == "warmup":  # none where the pairs come from a file
        series = [run.series(stage, key) for key in ("pairs/kept", "pairs/dropped")]
        return int(sum(sum(found.values) for found in series if found is not None))
    found = run.series(stage, "rollout/responses")
    return None if found is None else int(sum(found.values))


def _seconds(run: RunDirectory, stage: str) -> float | None:
    """Wall-clock of a stage without its evaluation."""
    whole = run.finished.get(stage)
    if whole is None or stage not in run.evals:
        return whole
    evaluation = run.eval_metrics.get(stage, {}).get("time/seconds")
    return None if evaluation is None else whole - evaluation


def _sum(values: Sequence[Any]) -> Any:
    """Their sum, None where one is missing."""
    return None if None in values else sum(values)


def verdicts(run: RunDirectory, summary: Summary) -> list[str]:
    """The results in words; a comparison that cannot be made is named as missing."""
    sentences = [_whole(summary), *(_against(summary, "rlvr", control) for control in ("sft", "sft_continued"))]
    sentences.append(_alignment(summary))
    return [*sentences, *_warmup(run)]


def _whole(summary: Summary) -> str:
    """PRISM against as many updates of RLVR without it, and the cost of both."""
    whole = "the whole of PRISM (warm-up, alignment, RLVR)" if summary.stage("align") else stage_name("rlvr")
    sentence = _against(summary, "rlvr", "rlvr_direct", whole)
    entry, base = summary.stage("rlvr"), summary.stage("rlvr_direct")
    if entry is None or base is None or entry.arm is None or base.arm is None:
        return sentence
    return f"{sentence} Cost behind SFT, evaluation left out: {entry.arm.in_words()} against {base.arm.in_words()}."


def _against(summary: Summary, stage: str, control: str, left: str | None = None) -> str:
    """``left``: the stage's name in the sentence."""
    left, right = left or stage_name(stage), stage_name(control)
    entry, base = summary.stage(stage), summary.stage(control)
    if entry is None or base is None:
        missing = " and ".join(stage_name(name) for name in (stage, control) if summary.stage(name) is None)
        return f"Whether {left} is better than {right} cannot be said: no evaluation of {missing}."
    difference = entry.against.get(control)
    if difference is None:
        return f"Whether {left} is better than {right} cannot be said: there is no paired comparison (see the notes)."
    numbers = f"{points(difference)} percentage points, {evidence(difference)}, {entry.accuracy.items} items"
    left = left[0].upper() + left[1:]
    if difference.direction > 0:
        return f"{left} is above {right} at 95 % confidence: {numbers}."
    if difference.direction < 0:
        return f"{left} is below {right} at 95 % confidence: {numbers}."
    return f"{left} cannot be told from {right} at 95 % confidence: {numbers}."


def _alignment(summary: Summary) -> str:
    entry = summary.stage("align")
    difference = entry.against.get("sft") if entry is not None else None
    if entry is None or difference is None:
        return "The effect of alignment was not measured: it takes an evaluation after SFT and one after alignment."
    what = f"Alignment by itself changed held-out accuracy by {points(difference)} percentage points against SFT"
    what += f" ({evidence(difference)})"
    if difference.direction > 0:
        return f"{what}: a gain at 95 % confidence."
    if difference.direction < 0:
        return f"{what}: a loss at 95 % confidence."
    return f"{what}: not distinguishable from no effect."


def _warmup(run: RunDirectory) -> list[str]:
    parts = []
    for span in SCORED:
        margin = run.series("warmup", f"warmup/heldout_margin_{span}")
        accuracy = run.series("warmup", f"warmup/heldout_acc_{span}")
        if margin is not None and accuracy is not None:
            parts.append(f"{span} {margin.values[-1]:.2f} (accuracy {100 * accuracy.values[-1]:.1f} %)")
    if not parts:
        return []
    return [f"Held-out margin of the discriminator at the end of its warm-up: {', '.join(parts)}."]


def points(difference: Difference) -> str:
    """As signed percentage points with the interval, ``+3.2 [+1.0, +5.3]``, or ``+3.2`` where there is none."""
    mean, interval = _signed(100.0 * difference.mean), difference.interval
    return mean if interval is None else f"{mean} [{_signed(100.0 * interval.low)}, {_signed(100.0 * interval.high)}]"


def evidence(difference: Difference) -> str:
    """p, and why there is no interval where there is none."""
    return ", ".join(filter(None, (p_value(difference.p), no_interval(difference))))


def no_interval(difference: Difference) -> str:
    """Why the difference has no interval; "" where it has one."""
    if difference.interval is not None:
        return ""
    count = difference.differing
    differ = "no image differs" if count == 0 else f"{count} image{'s differ' if count > 1 else ' differs'}"
    return f"no interval: {differ}, it takes {ENOUGH}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def wall(seconds: float | None) -> str:
    return ABSENT if seconds is None else duration(seconds)


def duration(value: float) -> str:
    """Seconds as text: ``4.2 s``, ``3 min 12 s``, ``5 h 03 min``."""
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")


def _rank(stage: str) -> int:
    return EVALUATED.index(stage) if stage in EVALUATED else len(EVALUATED)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


def _accuracy(items: Sequence[dict[str, Any]]) -> Accuracy:
    correct = [item["correct"] for item in items]
    clusters = [str(item["cluster"]) for item in items]
    count = len(set(clusters))
    interval = accuracy_interval(correct, clusters) if count > 1 else None
    return Accuracy(len(items), count, _mean(correct), interval)


def _difference(run: RunDirectory, stage: str, control: str, notes: list[str]) -> Difference | None:
    a, b = run.evals[stage], run.evals[control]
    uids = [item["uid"] for item in a], [item["uid"] for item in b]
    left, right = stage_name(stage), stage_name(control)
    if uids[0] != uids[1]:
        common = len(set(uids[0]) & set(uids[1]))
        notes.append(
            f"{left} ({len(a)} items) and {right} ({len(b)} items) were not evaluated on the same items "
            f"({common} in common), so they are not compared."
        )
        return None
    clusters = [item["cluster"] for item in a]
    if clusters != [item["cluster"] for item in b]:
        notes.append(f"{left} and {right} name different clusters for the same items, so they are not compared.")
        return None
    correct = [item["correct"] for item in a], [item["correct"] for item in b]
    return paired_difference(*correct, clusters, seed=SEED, resamples=RESAMPLES, uids=uids)


def _check_against_log(run: RunDirectory, stage: str, items: Sequence[dict[str, Any]], notes: list[str]) -> None:
    if stage in run.incomplete:
        notes.append(f"The evaluation of {stage_name(stage)} is not finished: {len(items)} items so far.")
        return
    logged = run.eval_metrics.get(stage, {}).get("eval/accuracy")
    found = _mean([item["correct"] for item in items])
    if logged is None:
        notes.append(
            f"metrics.jsonl has no line for the evaluation of {stage_name(stage)}: it may not have been finished."
        )
    elif abs(logged - found) > 1e-6:
        notes.append(
            f"{stage_name(stage)}: metrics.jsonl says an accuracy of {logged:.4f}, the {len(items)} items on disk give "
            f"{found:.4f}. The items count here."
        )
