"""Settings of the stages and of generation: ``sft``, ``warmup``, ``align``, ``rlvr``, ``eval``, ``rollout``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from prism_fast.config.errors import require
from prism_fast.config.models import UpcycleConfig
from prism_fast.engine.optimizer import OptimizerConfig

Loss = Literal["prism", "grpo", "dapo", "gspo", "dr_grpo", "bnpo", "cispo", "sapo"]


@dataclass
class SftConfig:
    # plateau: runs at a constant learning rate until the validation loss stops improving, then decays it to zero.
    # updates: runs for max_updates or for epochs, with sft.optimizer.schedule, as published.
    ends: Literal["plateau", "updates"] = "plateau"
    max_updates: int = 2000
    epochs: float | None = None  # passes over data.sft in place of max_updates, for sft.ends=updates
    batch: int = 32  # demonstrations per update
    # Assistant turns of a demonstration that are learned. last: the last one. all: each one after the turns before it,
    # as one response each; sft/tokens counts what is learned.
    turns: Literal["last", "all"] = "last"
    eval_every: int = 50
    patience: int = 2  # evaluations without improvement before the decay begins
    min_improvement: float = 0.01  # relative
    decay_share: float = 0.3  # updates of the decay, as a share of those before it
    freeze: list[str] = field(default_factory=list)  # further model.freeze of sft and sft_continued
    continued_lr_scale: float = 0.1  # of sft.optimizer.lr, where the control that continues SFT begins; falls to 0
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))

    def __post_init__(self) -> None:
        if self.ends == "plateau":
            rule = "with sft.ends=plateau, which decays the rate itself; set sft.ends=updates"
            require(self.epochs is None, "sft.epochs", f"left out {rule}", self.epochs)
            schedule, share = self.optimizer.schedule, self.optimizer.warmup_share
            require(schedule == "constant", "sft.optimizer.schedule", f"'constant' {rule}", schedule)
            require(share == 0, "sft.optimizer.warmup_share", f"0 {rule}", share)


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
    # Masters, moments and gradients of what learns wait in the CPU's memory while responses are generated.
    offload: bool = False
    # Weights of the policy loss against the gap between the engine's log-probs and the trainer's, for responses that
    # the current weights sampled: w = trainer's probability / engine's. truncated: w of a token, at most
    # importance_threshold = C (TIS). masked: w of a token, 0 outside [1/C, C] (IcePop). sequence_masked: w of a whole
    # response, 0 outside [1/C, C]. They cost a fourth pass over the output matrix.
    importance: Literal["off", "truncated", "masked", "sequence_masked"] = "off"
    importance_threshold: float = 2.0
    # Mean gap of an update, nats per token, above which a run warns, and above which it ends before the update. null:
    # 1e-4 and 0.02 in float32, 0.05 and 0.5 in bfloat16. Not with `replay`.
    gap_warn: float | None = None
    gap_stop: float | None = None


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
        require(0.0 < self.heldout_share < 1.0, "warmup.heldout_share", "between 0 and 1", self.heldout_share)


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
class LossTermsConfig:
    """What is added to a preset of the policy loss, or changed in it. Each response is then computed, also one without
    an advantage. Not with ``semantics`` of published code or equations, which have none of it."""

    # Weight of the KL term, per token and in nats, against the policy that the stage began with: its copy, or the
    # policy without its adapters (model.lora). Costs one more forward; policy/kl shows it.
    kl_coef: float = 0.0
    # Estimator of the KL term from log p - log p_ref = d. k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d; abs: |d|.
    kl: Literal["k1", "k2", "k3", "abs"] = "k3"
    entropy_coef: float = 0.0  # weight of the mean entropy, which the loss then raises; policy/entropy_bonus shows it
    # Below and above 1, how far a ratio of off-policy rows may go (cispo: bounds of its weight); null: the preset's.
    clip: tuple[float, float] | None = None
    dual_clip: float | None = None  # largest ratio of rows with a negative advantage; null: the preset's

    def options(self) -> dict[str, Any]:
        """As options of the policy loss; None leaves the preset's."""
        clip = None if self.clip is None else tuple(self.clip)
        return {**vars(self), "clip": clip}


@dataclass
class AlignConfig:
    steps: int = 500
    epochs: float | None = None  # passes over data.align in place of steps, rounded up to whole steps
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
    loss_terms: LossTermsConfig = field(default_factory=LossTermsConfig)
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    tokens_per_micro_batch: int = 16384
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator: DiscriminatorUpdateConfig = field(default_factory=DiscriminatorUpdateConfig)

    def __post_init__(self) -> None:
        for name in ("clip", "dual_clip"):
            value, allowed = getattr(self.loss_terms, name), "left out: every step of alignment is on-policy, ratio 1"
            require(value is None, f"align.loss_terms.{name}", allowed, value)
        require(any(self.weights), "align.weights", "0 or more, one of them above 0", self.weights)
        if self.credit == "span":
            setting = "with align.credit=span, which divides the default advantage"
            require(self.discriminate == "spans", "align.discriminate", f"'spans' {setting}", self.discriminate)
            require(self.advantage == "default", "align.advantage", f"'default' {setting}", self.advantage)
            require(self.loss != "gspo", "align.loss", f"another {setting}: gspo has one ratio per response", self.loss)
        else:
            allowed = "'mean' without align.credit=span"
            require(self.answer_credit == "mean", "align.answer_credit", allowed, self.answer_credit)
        if self.discriminate == "response":
            require(tuple(self.weights) == (0.5, 0.5), "align.weights", "left out: one score", self.weights)


@dataclass
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: a group whose rewards are all equal has no gradient, so others are generated until a
    step has ``rlvr.prompts`` useful ones. The surplus of a round goes into the next step."""

    enabled: bool = False
    max_rounds: int = 10  # of generation per step; then the step trains on the groups found
    max_oversampling: float = 3.0  # largest round, as a multiple of rlvr.prompts

    def __post_init__(self) -> None:
        key = "rlvr.dynamic_sampling"
        require(self.max_oversampling >= 1, f"{key}.max_oversampling", "1 or more", self.max_oversampling)


@dataclass
class RlvrConfig:
    """Of the stages rlvr and rlvr_direct; the latter takes its number of steps from `control_updates`."""

    steps: int = 1500
    epochs: float | None = None  # passes over data.rlvr in place of steps, rounded up to whole steps
    prompts: int = 32
    loss: Loss = "grpo"  # a preset of the policy loss
    loss_terms: LossTermsConfig = field(default_factory=LossTermsConfig)
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
        for name in ("clip", "dual_clip"):
            value = getattr(self.loss_terms, name)
            allowed = "left out where every ratio is 1; set rlvr.updates_per_step above 1"
            off_policy = updates > 1 or self.dynamic_sampling.enabled
            require(value is None or off_policy, f"rlvr.loss_terms.{name}", allowed, value)
        require(1 <= updates <= self.prompts, "rlvr.updates_per_step", "between 1 and rlvr.prompts", updates)
        allowed = f"between 0 and rlvr.rollout.max_new_tokens={longest}"
        require(buffer == 0 or 0 < buffer <= longest, "rlvr.overlong_buffer", allowed, buffer)
        if self.dynamic_sampling.enabled:
            allowed = "left out with dynamic sampling, whose steps take as many tasks as they need; set rlvr.steps"
            require(self.epochs is None, "rlvr.epochs", allowed, self.epochs)
            # The reward of a lone rollout has nothing to differ from.
            require(self.rollout.n >= 2, "rlvr.rollout.n", "2 or more with dynamic sampling", self.rollout.n)


@dataclass
class EvalConfig:
    """How ``data.eval`` is answered. Rows of several ``data_source`` are also counted each (eval/accuracy_on/...)."""

    samples: int = 1  # answers per item; of several, eval/accuracy is their mean, and eval/pass@k are measured
    every: int = 0  # steps of align and rlvr between evaluations inside the stage; 0: only after it
    metric: str = "eval/accuracy"  # what keep_best and patience compare; more is better
    keep_best: bool = False  # export/<stage>-best holds the policy that was best inside the stage
    patience: int | None = None  # evaluations in a row without a better one, after which the stage ends; none: no end
    batch: int = 128  # prompts after which answers are kept: a stop loses less than that
    temperature: float = 0.0
    # After the temperature only so many of the likeliest tokens (0: all), then only the likeliest that together reach
    # this probability (1: all). Published: temperature 1, top_p 0.7. Training samples from the whole distribution,
    # because its losses need the log-probs of that.
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    limit: int | None = None  # first so many items; none: all

    def __post_init__(self) -> None:
        for name, whole in {"top_k": 0, "top_p": 1.0}.items():
            value, allowed = getattr(self, name), "left out with eval.temperature=0, which takes the likeliest token"
            require(value == whole or self.temperature > 0, f"eval.{name}", allowed, value)
        allowed = "1 with eval.temperature=0: greedy answers to one prompt do not differ"
        require(self.samples == 1 or self.temperature > 0, "eval.samples", allowed, self.samples)
        if self.every == 0:
            allowed = "left out without eval.every, on whose evaluations it acts"
            require(not self.keep_best, "eval.keep_best", allowed, self.keep_best)
            require(self.patience is None, "eval.patience", allowed, self.patience)
