"""Configuration: dataclasses, YAML recipes and ``key.sub=value`` overrides.

A recipe is a YAML file that holds only what differs from the defaults below. Unknown keys, wrong types and values out
of range are errors that name the key. The resolved configuration is written to the run directory as ``config.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.entries import check_columns, entries_of
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.recipes.checks import check_numbers, check_yaml
from prism_fast.recipes.hints import how_to_write, nearest

Loss = Literal["prism", "grpo", "dapo", "gspo", "dr_grpo", "bnpo", "cispo", "sapo"]
STAGES = ("sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr")
CONTROLS = ("sft_continued", "rlvr_direct")  # start from SFT's policy; no later stage starts from theirs


class ConfigError(ValueError):
    """A recipe or an override is wrong; the message names the key and what is allowed."""


def _require(condition: bool, key: str, allowed: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


@dataclass
class TinyConfig:
    """Sizes of the policy that is built when ``model.policy`` is ``tiny`` (the real Qwen3-VL class, small)."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    vision_depth: int = 2
    vision_width: int = 96
    vision_heads: int = 4
    vision_intermediate_size: int = 256
    initializer_range: float = 0.06  # at this width, far better than the 0.02 of large models


@dataclass
class ModelConfig:
    policy: str = "tiny"  # `tiny`, or the folder of any Qwen3-VL checkpoint
    discriminator: str = "upcycle"  # `upcycle` (from the policy), or the folder of a discriminator checkpoint
    dtype: Literal["float32", "bfloat16"] = "float32"
    # For policy and discriminator in training: a layer keeps only its input and computes the rest again for the
    # backward. The same bits for less memory and a third more work; passes/*_recomputed counts it.
    gradient_checkpointing: bool = False
    # Norms, rotary embedding and SwiGLU of the language models by Liger's kernels. auto: on CUDA where liger-kernel is
    # installed; liger: an error where they cannot run. environment.json and the report name the kernels used.
    fused_trunk: Literal["auto", "off", "liger"] = "auto"
    # Kernels of attention over packed rows and images on CUDA. torch: those compiled into PyTorch; flash_attn: the
    # package flash-attn 2; fa3, fa4: FlashAttention 3 on cards of 9.x, 4 on cards of 10.x, instead of PyTorch's. auto:
    # by a table of cards (ops/flash.py), fa3 or fa4 where installed. A kernel asked for by name that cannot run is an
    # error. Results differ in their bits. environment.json and the report name the kernels used.
    attention: Literal["auto", "torch", "flash_attn", "fa3", "fa4"] = "auto"
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass
class UpcycleConfig:
    num_experts: int = 4
    top_k: int = 2
    noise_std: float = 0.01
    router_std: float = 0.02

    def __post_init__(self) -> None:
        _require(1 <= self.top_k <= self.num_experts, "warmup.upcycle.top_k", "between 1 and num_experts", self.top_k)


_DATA_SETS = ("data.sft", "data.sft_val", "data.align", "data.rlvr", "data.eval", "data.pairs")


@dataclass
class DataConfig:
    """``source: digits`` writes the built-in data first; ``source: files`` reads yours. Each key is a file, a folder, a
    glob, a hub name, a list of these, or ``{path, weight, split, name, columns, image_root}`` (data/entries.py)."""

    source: Literal["digits", "files"] = "files"
    sft: Any = None  # demonstrations
    sft_val: Any = None  # demonstrations; none: a part of sft
    align: Any = None  # tasks with teacher texts
    rlvr: Any = None  # tasks
    eval: Any = None  # tasks
    pairs: Any = None  # of a teacher and a student; none: the policy samples its own
    validation_split: float = 0.05  # of data.sft, where data.sft_val is not given; an image is never on both sides
    columns: dict[str, str] = field(default_factory=dict)  # our name of a field: its name in the files
    image_root: str | None = None  # where relative image paths begin; none: at their file
    # For rows without a system turn. published: the one that asks for caption, think and answer; or a text, or a file
    # (.txt, .md). none: nothing is added (pairs: the published one).
    system_prompt: str | None = None
    max_image_pixels: int = 16_777_216  # a larger image is refused before it is decoded
    # Images are resized to at least and at most so many pixels, as the model's image processor does; none: its own
    # limits. 1,024 pixels are one token of Qwen3-VL. Exported models keep the limits they were trained with.
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_prompt_tokens: int | None = None  # a longer prompt (image tokens counted) is a bad sample; none: no limit
    # raise: name file, row and field and stop. skip: leave it out and count it under its reason in the metrics. With
    # skip or a token limit every image is decoded once when a stage starts.
    on_bad_sample: Literal["raise", "skip"] = "raise"
    digits: DigitsSpec = field(default_factory=DigitsSpec)  # sizes of the built-in dataset

    def __post_init__(self) -> None:
        try:
            for key in _DATA_SETS:
                if (value := getattr(self, key.removeprefix("data."))) is not None:
                    entries_of(value, key, weights=key in ("data.sft", "data.align", "data.rlvr"))
            check_columns(self.columns, "data.columns")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _require(0 < self.validation_split < 1, "data.validation_split", "between 0 and 1", self.validation_split)
        if self.min_pixels is not None and self.max_pixels is not None:
            allowed = f"at most data.max_pixels = {self.max_pixels}"
            _require(self.min_pixels <= self.max_pixels, "data.min_pixels", allowed, self.min_pixels)


@dataclass
class JudgeConfig:
    """A language model behind an OpenAI-compatible chat API. It grades the data sources that need one (mm_gad_llm),
    where the rules find no agreement. Off without a ``url``."""

    url: str | None = None  # base of the API, e.g. http://localhost:8000/v1
    model: str | None = None  # its name there
    api_key_env: str | None = None  # environment variable that holds the key; none: no key is sent
    timeout_s: float = 30.0  # of one try, answer included
    attempts: int = 3  # tries of one question; one without an answer is counted as reward/judge_errors
    concurrency: int = 8  # questions asked at the same time

    def __post_init__(self) -> None:
        allowed = "an http:// or https:// address, or null for no judge"
        is_address = self.url is not None and self.url.startswith(("http://", "https://"))
        _require(self.url is None or is_address, "reward.judge.url", allowed, self.url)
        _require(self.url is None or bool(self.model), "reward.judge.model", "given with reward.judge.url", self.model)


@dataclass
class RewardConfig:
    """Checking answers. Formulas are compared in worker processes that the kernel ends at their limits."""

    workers: int = 1
    timeout_s: float = 5.0  # CPU seconds of one comparison, and three times as many on the clock
    memory_mb: int = 1024  # address space of a worker
    max_answer_chars: int = 1024  # a longer answer is not right
    # Reward functions of your own, `data_source: package.module:function`; they grade the rows of that data_source.
    functions: dict[str, str] = field(default_factory=dict)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        _require(self.memory_mb >= 256, "reward.memory_mb", "256 or more", self.memory_mb)


@dataclass
class SftConfig:
    """Runs at a constant learning rate until the validation loss stops improving, then decays it to zero."""

    max_updates: int = 2000
    batch: int = 32
    eval_every: int = 50
    patience: int = 2  # evaluations without improvement before the decay begins
    min_improvement: float = 0.01  # relative
    decay_share: float = 0.3  # updates of the decay, as a share of those before it
    continued_lr_scale: float = 0.1  # of sft.optimizer.lr, where the control that continues SFT begins
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))


@dataclass
class SamplingConfig:
    n: int = 16  # rollouts per prompt
    temperature: float = 1.0
    max_new_tokens: int = 512


@dataclass
class RolloutConfig:
    """The engine that generates for alignment, RLVR, pair sampling and evaluation alike."""

    engine: str = "hf"  # hf: transformers' modules, on any device; vllm: vLLM in this process
    # Further arguments of vllm.LLM, e.g. max_model_len, max_num_seqs, enforce_eager; for rollout.engine=vllm.
    vllm: dict[str, Any] = field(default_factory=dict)
    # Tokens in the KV cache at once, a response counted with its prompt and at its full length; other responses wait.
    # Halved when memory runs out. Responses do not depend on it.
    tokens_in_flight: int = 262144


@dataclass
class WarmupConfig:
    """Discriminator warm-up: ends when the held-out margin reaches ``target_margin``, never on a step count alone."""

    prompts: int = 8  # prompts per update
    pairs_per_prompt: int = 4  # student samples per alignment prompt when the policy samples its own pairs
    heldout_share: float = 0.1
    eval_every: int = 10
    target_margin: float = 1.0  # of the mean held-out margin, caption and reasoning each
    max_updates: int = 1000  # reaching it without the margin is an error
    aux_coef: float = 0.01  # of the load-balancing loss; no effect under `released`, as published
    tokens_per_micro_batch: int = 16384
    temperature: float = 1.0
    max_new_tokens: int = 512
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))

    def __post_init__(self) -> None:
        _require(0.0 < self.heldout_share < 1.0, "warmup.heldout_share", "between 0 and 1", self.heldout_share)


@dataclass
class DiscriminatorUpdateConfig:
    """null: the default of ``semantics``: clip 10 and regulariser 0.001, under ``paper`` neither. Both also act in the
    warm-up; under ``released`` only if set."""

    score_clip: float | None = None  # scores are clamped to +- this in the loss and the advantage
    score_reg: float | None = None  # weight of the scores' mean square in the discriminator's loss
    # b in score - b * log(1 + tokens of its span), in the loss and the advantage: no text is better for being long.
    length_penalty: float = 0.0
    # Weight of a term that keeps the scores of a prompt's responses apart, at normal quantiles of deviation 1 (GRGC,
    # arXiv 2609.39757). Bradley-Terry alone is smallest where all are equal, and equal scores give no advantage.
    spread: float = 0.0
    updates: int = 1  # per step; the first uses the pass that gives the rewards, each further one a pass of its own
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class AlignConfig:
    steps: int = 500
    prompts: int = 4  # prompts per step
    advantage: Literal["default", "acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align"] = "default"
    # The texts that the discriminator scores, in its warm-up too: caption and reasoning each, or the whole response
    # against the teacher's whole response (GAD, arXiv 2511.10643).
    discriminate: Literal["spans", "response"] = "spans"
    weights: tuple[float, float] = (0.5, 0.5)  # caption, reasoning
    # Which tokens an advantage reaches. response: all of the response, as published. span: tokens of the caption get
    # the caption's advantage, those of the reasoning trace the reasoning's, those of the answer see answer_credit.
    credit: Literal["response", "span"] = "response"
    answer_credit: Literal["mean", "verifier"] = "mean"  # of both advantages, or the advantage of the checked answer
    format_penalty: float | None = None  # subtracted from an invalid response's advantage; null: 1.5, under `paper` 0
    loss: Loss = "prism"  # a preset of the policy loss
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator: DiscriminatorUpdateConfig = field(default_factory=DiscriminatorUpdateConfig)

    def __post_init__(self) -> None:
        _require(any(self.weights), "align.weights", "0 or more, one of them above 0", self.weights)
        if self.credit == "span":
            setting = "with align.credit=span, which divides the default advantage"
            _require(self.discriminate == "spans", "align.discriminate", f"'spans' {setting}", self.discriminate)
            _require(self.advantage == "default", "align.advantage", f"'default' {setting}", self.advantage)
            _require(
                self.loss != "gspo", "align.loss", f"another {setting}: gspo has one ratio per response", self.loss
            )
        else:
            allowed = "'mean' without align.credit=span"
            _require(self.answer_credit == "mean", "align.answer_credit", allowed, self.answer_credit)
        if self.discriminate == "response":
            _require(tuple(self.weights) == (0.5, 0.5), "align.weights", "left out: one score", self.weights)


@dataclass
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: a group whose rewards are all equal has no gradient, so others are generated until a
    step has ``rlvr.prompts`` useful ones. The surplus of a round goes into the next step."""

    enabled: bool = False
    max_rounds: int = 10  # of generation per step; then the step trains on the groups found
    max_oversampling: float = 3.0  # largest round, as a multiple of rlvr.prompts

    def __post_init__(self) -> None:
        key = "rlvr.dynamic_sampling"
        _require(self.max_oversampling >= 1, f"{key}.max_oversampling", "1 or more", self.max_oversampling)


@dataclass
class RlvrConfig:
    """Of the stages rlvr and rlvr_direct; the latter takes its number of steps from `control_updates`."""

    steps: int = 1500
    prompts: int = 32
    loss: Loss = "grpo"  # a preset of the policy loss
    # Optimizer updates of a step, each on its share of the groups. After the first one the rollouts are off-policy, and
    # the loss's clip range begins to act; the published recipes all have 1.
    updates_per_step: int = 1
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    overlong_buffer: int = 0  # tokens before max_new_tokens over which the reward of a response falls; 0: none
    overlong_factor: float = 1.0  # by how much it has fallen at max_new_tokens
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        updates, buffer, longest = self.updates_per_step, self.overlong_buffer, self.rollout.max_new_tokens
        _require(1 <= updates <= self.prompts, "rlvr.updates_per_step", "between 1 and rlvr.prompts", updates)
        allowed = f"between 0 and rlvr.rollout.max_new_tokens={longest}"
        _require(buffer == 0 or 0 < buffer <= longest, "rlvr.overlong_buffer", allowed, buffer)
        if self.dynamic_sampling.enabled:  # the reward of a lone rollout has nothing to differ from
            _require(self.rollout.n >= 2, "rlvr.rollout.n", "2 or more with dynamic sampling", self.rollout.n)


@dataclass
class EvalConfig:
    batch: int = 128  # prompts after which answers are kept: a stop loses less than that
    temperature: float = 0.0
    max_new_tokens: int = 512
    limit: int | None = None  # first so many items; none: all


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
    dump_rollouts_every: int = 10  # alignment and RLVR steps whose rollouts are kept as text
    # Run directory whose dumped rollouts alignment and RLVR train on instead of generating: the same steps again, to
    # the bit if the rest of the configuration is the same. That run must have kept every step (dump_rollouts_every=1).
    replay: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
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
                _require(rollout.n >= 2 or lone, f"{stage}.rollout.n", "2 or more: answers are compared", rollout.n)
                allowed = "positive: greedy answers to one prompt do not differ"
                _require(rollout.temperature > 0, f"{stage}.rollout.temperature", allowed, rollout.temperature)
        order = [STAGES.index(stage) for stage in self.stages]
        _require(order == sorted(set(order)), "stages", f"in the order {', '.join(STAGES)}, each once", self.stages)
        for control in CONTROLS:
            if control in self.stages and control_updates(self) == 0:
                raise ConfigError(
                    f"stages: {control} is the control of align and rlvr: one of them must be there and have steps"
                )
        if self.semantics == "released":  # the published code stops with a KeyError in this mode
            allowed = "'spans' with semantics=released, which has no whole-response mode"
            _require(self.align.discriminate == "spans", "align.discriminate", allowed, self.align.discriminate)
            allowed = "'response' with semantics=released, which gives a response one advantage"
            _require(self.align.credit == "response", "align.credit", allowed, self.align.credit)
            spread = self.align.discriminator.spread
            _require(
                spread == 0, "align.discriminator.spread", "0 with semantics=released, which has no such term", spread
            )
        if self.semantics == "paper":
            allowed = "'response' with semantics=paper, whose equations give a response one advantage"
            _require(self.align.credit == "response", "align.credit", allowed, self.align.credit)
            allowed = "'default' with semantics=paper, whose equations have no other"
            _require(self.align.advantage == "default", "align.advantage", allowed, self.align.advantage)


def sampling_of(config: Config, stage: str) -> SamplingConfig:
    """How a stage that trains on rollouts samples them."""
    return (config.align if stage == "align" else config.rlvr).rollout


def control_updates(config: Config) -> int:
    """Updates of the policy in alignment and RLVR together, where they are in ``stages``: the controls get as many."""
    updates = {"align": config.align.steps, "rlvr": config.rlvr.steps * config.rlvr.updates_per_step}
    return sum(count for stage, count in updates.items() if stage in config.stages)


def shipped_recipes() -> list[str]:
    folder = resources.files("prism_fast.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe (the name of a shipped one, or the path of a YAML file) and ``key.sub=value`` overrides.

    Raises:
        ConfigError: the recipe does not exist, a key is unknown, a value has the wrong type or is out of range.
    """
    shipped = shipped_recipes()
    if recipe in shipped:
        text = resources.files("prism_fast.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
        origin = f"recipe {recipe!r}"
    elif Path(recipe).is_file():
        try:
            text, origin = Path(recipe).read_text(encoding="utf-8-sig"), recipe
        except UnicodeDecodeError as error:
            raise ConfigError(f"{recipe}: not UTF-8 text ({error})") from error
    else:
        raise ConfigError(
            f"no recipe {recipe!r}: neither a file nor a shipped recipe "
            f"({', '.join(shipped)}){nearest(recipe, shipped)}"
        )
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} must have the form key.sub=value")
        _checked(lambda value=value: check_yaml(value, mapping=False), f"override {key!r}")
    _checked(lambda: check_yaml(text, mapping=True), origin)
    try:
        config = OmegaConf.structured(Config)
        config = OmegaConf.merge(config, OmegaConf.create(text))
        for key in (override.partition("=")[0] for override in overrides):
            if key in _DATA_SETS:  # replaces the recipe's, which may be a list where this is a mapping
                OmegaConf.update(config, key, None)
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        resolved = OmegaConf.to_object(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{origin}: {error.__cause__}") from error
        message = str(error.msg or error).strip().splitlines()[0]
        if isinstance(error, ConfigKeyError) and "Did you mean" not in message and is_dataclass(error.object_type):
            message += f", which has {', '.join(entry.name for entry in fields(error.object_type))}"
        if key := getattr(error, "full_key", None):
            given = dict(override.split("=", 1) for override in overrides).get(key)
            message += f" (key {key}){how_to_write(Config, key, given)}"
        raise ConfigError(f"{origin} with {list(overrides)}: {message}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a duplicate key, a number of thousands of digits
        raise ConfigError(f"{origin} with {list(overrides)}: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, Config)
    _checked(lambda: check_numbers(resolved), origin)
    return resolved


def _checked(check: Callable[[], None], origin: str) -> None:
    try:
        check()
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
