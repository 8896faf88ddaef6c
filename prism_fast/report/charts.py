"""The charts of each stage: which metrics share one. Metrics have the names that training writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Scale = Literal["free", "zero", "share", "percent", "log"]
"""y axis: as the data; from zero; shares from 0 to 100 %; shares from zero; logarithmic where all are positive."""


@dataclass(frozen=True)
class Chart:
    """One small chart: ``series`` are (metric, label) pairs that share the y axis."""

    title: str
    series: tuple[tuple[str, str], ...]
    note: str = ""
    scale: Scale = "free"
    line: float | str | None = None  # dotted line at this value, or at that of this key of the configuration
    line_name: str = ""
    optional: bool = False  # some configurations do not write these metrics: not reported as missing
    exact: bool = False  # a schedule: drawn as it is, without a running mean and with all of its range


SCORED = ("caption", "reasoning", "response")  # names of scores; a run has the first two or the last


def _spans(prefix: str, name: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{prefix}/{name}_{span}", span) for span in SCORED)


def _one(title: str, key: str, note: str = "", scale: str = "zero", optional: bool = False) -> Chart:
    return Chart(title, ((key, title.lower()),), note, scale, optional=optional)


REWARD_PARTS = "reward/parts/"  # before the names that a reward function gives its parts


def reward_parts(keys: Iterable[str]) -> tuple[Chart, ...]:
    """The chart of the parts among a stage's metrics; none without any."""
    series = tuple((key, key.removeprefix(REWARD_PARTS)) for key in keys if key.startswith(REWARD_PARTS))
    chart = Chart("Parts of the reward", series, "of your reward functions, means over the responses that have them")
    return (chart,) if series else ()


def _schedule(title: str, key: str) -> Chart:
    return Chart(title, ((key, title.lower()),), scale="zero", exact=True)


_CHANCE = {"scale": "share", "line": 0.5, "line_name": "chance"}
_SFT = (
    _one("Gradient norm", "sft/grad_norm", "before clipping"),
    _schedule("Learning rate", "sft/lr"),
)
_NLL = "mean negative log-likelihood per response token"
_WARMUP = (
    Chart(
        "Held-out margin",
        _spans("warmup", "heldout_margin"),
        "teacher minus student score on prompts it never trained on",
        line="warmup.target_margin",
        line_name="target",
    ),
    Chart(
        "Held-out accuracy",
        _spans("warmup", "heldout_acc"),
        "share of held-out pairs with the teacher on top; ties left out",
        **_CHANCE,
    ),
    Chart("Loss", (("warmup/loss", "training"),), "pairwise loss with load balance"),
    Chart("Training margin", _spans("warmup", "margin"), line=0.0),
    Chart("Training accuracy", _spans("warmup", "acc"), **_CHANCE),
    _one("Gradient norm", "warmup/grad_norm", "before clipping"),
    _schedule("Learning rate", "warmup/lr"),
)
_DISCRIMINATOR = (
    Chart(
        "Discriminator margin",
        _spans("disc", "margin"),
        "teacher minus student score, before the step's update",
        line=0.0,
    ),
    Chart(
        "Discriminator accuracy",
        _spans("disc", "acc"),
        "share of pairs with the teacher on top; ties left out",
        **_CHANCE,
    ),
    Chart(
        "Student scores",
        tuple((f"score/{span}", span) for span in SCORED),
        "mean discriminator score of valid rollouts",
    ),
    Chart("Discriminator loss", (("disc/loss", "loss"),), "pairwise loss of the step, before its update"),
    _schedule("Discriminator's learning rate", "disc/lr"),
    Chart("Pairs", _spans("disc", "pairs"), "that differ from the teacher's text, per step", "zero"),
    Chart("Ties", _spans("disc", "ties"), "student texts equal to the teacher's, per step", "zero"),
    Chart(
        "Gradient norms",
        (("policy/grad_norm", "policy"), ("disc/grad_norm", "discriminator")),
        "before clipping",
        "zero",
    ),
)
_POLICY = (
    Chart(
        "Reward",
        (("reward/mean", "total"), ("reward/acc", "accuracy"), ("reward/format", "format")),
        "verifier's reward of the sampled rollouts and its parts",
    ),
    Chart("Response length", (("response_length/mean", "mean"), ("response_length/max", "maximum")), "tokens", "zero"),
    _one("Cut at the length limit", "response_length/clip_ratio", "share of rollouts", "percent"),
    _one("Entropy", "policy/entropy", "nats per token"),
    Chart(
        "Policy loss", (("policy/loss", "loss"),), "on-policy: its gradient matters, its value hovers near 0", line=0.0
    ),
    Chart(
        "Log-prob gap",
        (("rollout/logprob_gap_mean", "mean"), ("rollout/logprob_gap_max", "maximum")),
        "|rollout − trainer| per token, nats",
        "log",
    ),
    _schedule("Learning rate", "policy/lr"),
    Chart(
        "Answers without a verdict",
        (
            ("reward/timeouts", "timeouts"),
            ("reward/worker_deaths", "worker deaths"),
            ("reward/judge_errors", "judge"),
        ),
        "per step; they count as wrong",
        "zero",
        optional=True,
    ),
)
_STALE = (
    _one("Clipped tokens", "policy/clip_fraction", "of stale rows (sampled by earlier weights)", "percent", True),
    _one("Drift of stale rows", "policy/approx_kl", "divergence from the weights that sampled", "free", True),
    _one("Largest ratio", "policy/ratio_max", "of stale rows, before clipping", "free", True),
)
_SAMPLING = (
    Chart(
        "Groups sampled",
        (("sampling/generated", "generated"), ("sampling/banked", "kept"), ("sampling/missing", "missing")),
        "dynamic sampling, per step; kept ones go into the next step",
        "zero",
        optional=True,
    ),
    Chart(
        "Useful groups",
        (("sampling/useful_share", "of those generated"), ("sampling/expected_share", "expected")),
        "whose rewards differ",
        "share",
        optional=True,
    ),
    _one("Rounds of generation", "sampling/rounds", "per step", optional=True),
    Chart(
        "Age of groups",
        (("sampling/age_mean", "mean"), ("sampling/age_max", "maximum")),
        "steps between sampling and training",
        "zero",
        optional=True,
    ),
    _one("Overlong responses", "reward/overlong_share", "share of rollouts in the buffer", "percent", True),
    _one("Overlong penalty", "reward/overlong_penalty", "mean over all rollouts", "free", True),
)
_RLVR = (
    *_POLICY,
    _one("Gradient norm", "policy/grad_norm", "before clipping"),
    _one("Groups without signal", "advantage/zero_groups", "whose rollouts all got the same reward, per step"),
    _one("Tokens computed", "policy/tokens", "per step, prompts included"),
    *_STALE,
    *_SAMPLING,
)
CHARTS: dict[str, tuple[Chart, ...]] = {
    "sft": (Chart("Loss", (("sft/loss", "training"), ("sft/val_loss", "validation")), _NLL), *_SFT),
    "sft_continued": (Chart("Loss", (("sft/loss", "training"),), _NLL), *_SFT),
    "warmup": _WARMUP,
    "align": (
        *_DISCRIMINATOR,
        *_POLICY,
        Chart(
            "Tokens computed",
            (("policy/tokens", "policy"), ("disc/tokens", "discriminator")),
            "per step, prompts included",
            "zero",
        ),
    ),
    "rlvr_direct": _RLVR,
    "rlvr": _RLVR,
}
