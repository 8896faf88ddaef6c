"""The whole configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prism_fast.config.data import DataConfig, RewardConfig
from prism_fast.config.errors import ConfigError, require
from prism_fast.config.models import ModelConfig
from prism_fast.config.stages import (
    AlignConfig,
    EvalConfig,
    RlvrConfig,
    RolloutConfig,
    SamplingConfig,
    SftConfig,
    WarmupConfig,
)
from prism_fast.engine.settings import EngineConfig
from prism_fast.recipes.hints import nearest

STAGES = ("sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr")
CONTROLS = ("sft_continued", "rlvr_direct")  # start from SFT's policy; no later stage starts from theirs


@dataclass
class WandbConfig:
    project: str | None = None  # none: no W&B. The account is set by W&B's own means (`wandb login`, WANDB_ENTITY)
    mode: Literal["online", "offline"] = "online"  # offline: files in the run directory, for `wandb sync`


@dataclass
class TrackioConfig:
    project: str | None = None  # none: no trackio. Its place is set by trackio's own means (TRACKIO_DIR and others)


@dataclass
class TrackConfig:
    """Where metrics are shown beside ``metrics.jsonl`` and TensorBoard; each needs the extra of its name."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)


@dataclass
class Config:
    recipe: str = "custom"
    seed: int = 1
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    threads: int | None = None  # CPU threads of PyTorch; none: PyTorch's own choice
    out: str | None = None  # run directory; none: runs/<recipe>-<time>
    # prism_fast; released: the published code, except for the differences that a run and --dry-run print;
    # paper: PRISM's equations as printed (algorithms/semantics.py)
    semantics: Literal["prism_fast", "released", "paper"] = "prism_fast"
    layout: Literal["shared_prefix", "padded"] = "shared_prefix"  # of updates: a prompt once for all, or for each
    # rlvr_direct, RLVR without alignment before it, runs only where it is named: it costs more than alignment and RLVR.
    stages: list[str] = field(default_factory=lambda: [stage for stage in STAGES if stage != "rlvr_direct"])
    checkpoint_every: int = 50  # updates or steps; a stage's last one is always kept
    keep_checkpoints: int = 2
    profile: int = 0  # steps of each stage whose trace (on CUDA allocations too) is written to profile/; its first not
    dump_rollouts_every: int = 10  # alignment and RLVR steps whose rollouts are kept as text
    # Run directory whose dumped rollouts alignment and RLVR train on instead of generating: the same steps again, to
    # the bit if the rest of the configuration is the same. That run must have kept every step (dump_rollouts_every=1).
    replay: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    rlvr: RlvrConfig = field(default_factory=RlvrConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError(
                    f"stages: {stage!r} is not a stage; allowed: {', '.join(STAGES)}{nearest(stage, STAGES)}"
                )
        for stage in ("align", "rlvr", "rlvr_direct"):
            rollout = sampling_of(self, stage)
            if stage in self.stages:  # otherwise every group is one answer, and the run silently learns nothing
                lone = self.semantics == "released"  # the published formula takes a lone reward as its advantage
                require(rollout.n >= 2 or lone, f"{stage}.rollout.n", "2 or more: answers are compared", rollout.n)
                allowed = "positive: greedy answers to one prompt do not differ"
                require(rollout.temperature > 0, f"{stage}.rollout.temperature", allowed, rollout.temperature)
        allowed = "left out with model.lora, which freezes"
        require(not (self.model.lora.rank and self.sft.freeze), "sft.freeze", allowed, self.sft.freeze)
        optimizers = {"sft": self.sft, "warmup": self.warmup, "align": self.align, "rlvr": self.rlvr}
        for stage, section in {**optimizers, "align.discriminator": self.align.discriminator}.items():
            steps, share = section.optimizer.warmup_steps, section.optimizer.warmup_share
            allowed = f"0 where {stage}.optimizer.warmup_share={share:g} gives the same thing as a share"
            require(not (steps and share), f"{stage}.optimizer.warmup_steps", allowed, steps)
        for stage, section in {"align": self.align, "rlvr": self.rlvr}.items():
            controls = [name for name in self.stages if name in CONTROLS]
            allowed = f"left out with {', '.join(controls)} in stages, which count its steps; set {stage}.steps"
            require(section.epochs is None or not controls, f"{stage}.epochs", allowed, section.epochs)
        order = [STAGES.index(stage) for stage in self.stages]
        require(order == sorted(set(order)), "stages", f"in the order {', '.join(STAGES)}, each once", self.stages)
        for control in CONTROLS:
            if control in self.stages and control_updates(self) == 0:
                raise ConfigError(
                    f"stages: {control} is the control of align and rlvr: one of them must be there and have steps"
                )
        for stage, terms in {"align": self.align.loss_terms, "rlvr": self.rlvr.loss_terms}.items():
            if self.semantics != "prism_fast":
                changed = {name: value for name, value in vars(terms).items() if value != getattr(type(terms), name)}
                allowed = f"left out with semantics={self.semantics}, which has no such term"
                require(not changed, f"{stage}.loss_terms", allowed, changed)
        if self.semantics == "released":  # the published code stops with a KeyError in this mode
            allowed = "'spans' with semantics=released, which has no whole-response mode"
            require(self.align.discriminate == "spans", "align.discriminate", allowed, self.align.discriminate)
            allowed = "'response' with semantics=released, which gives a response one advantage"
            require(self.align.credit == "response", "align.credit", allowed, self.align.credit)
            spread = self.align.discriminator.spread
            require(
                spread == 0, "align.discriminator.spread", "0 with semantics=released, which has no such term", spread
            )
        if self.semantics == "paper":
            allowed = "'response' with semantics=paper, whose equations give a response one advantage"
            require(self.align.credit == "response", "align.credit", allowed, self.align.credit)
            allowed = "'default' with semantics=paper, whose equations have no other"
            require(self.align.advantage == "default", "align.advantage", allowed, self.align.advantage)


def sampling_of(config: Config, stage: str) -> SamplingConfig:
    """How a stage that trains on rollouts samples them."""
    return (config.align if stage == "align" else config.rlvr).rollout


def control_updates(config: Config) -> int:
    """Updates of the policy in alignment and RLVR together, where they are in ``stages``: the controls get as many."""
    updates = {"align": config.align.steps, "rlvr": config.rlvr.steps * config.rlvr.updates_per_step}
    return sum(count for stage, count in updates.items() if stage in config.stages)
