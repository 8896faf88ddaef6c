"""The needs of a recipe, before anything is loaded: parameters, memory per stage and phase, tokens per step.

Everything follows from the recipe, the models' configurations and two assumed lengths. The plan's ``assumptions`` name
upper bounds and omissions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from prism_fast.config import Config, ConfigError, LossTermsConfig, SamplingConfig, WarmupConfig, sampling_of
from prism_fast.data.framing import SPANS
from prism_fast.models.family import Family, Role, family_of
from prism_fast.models.policy import TinyPolicy, tiny_config
from prism_fast.models.sizes import (
    ModelSize,
    discriminator_size,
    kv_bytes_per_token,
    language_activation_bytes,
    policy_size,
    vision_activation_bytes,
)
from prism_fast.models.upcycle import sparse_config
from prism_fast.models.writing import shown_bytes
from prism_fast.ops import budgets
from prism_fast.ops.reference.linear_logprob import block_rows
from prism_fast.recipes.hints import how_to_get
from prism_fast.rollout.hf import SCORES_AT_ONCE
from prism_fast.rollout.vllm_build import cache_bytes
from prism_fast.train.adapt import adapt
from prism_fast.train.context import DTYPES
from prism_fast.train.layouts import Layout

# Default tokens of an expanded prompt, and of the images in it: for the built-in dataset, and for other files.
DEFAULT_TOKENS = {"digits": (48, 4), "files": (1024, 512)}
# Bytes of memory that CUDA reports for a card. A twentieth is reserved for memory that a plan does not count.
CARDS = {name: gib << 30 for name, gib in {"a100": 79, "h100": 79, "h200": 139, "b200": 178}.items()}
ASSUMPTIONS = (
    "Optimizer: AdamW with two moments and one step count per tensor. Moments and gradients have the weights' dtype, "
    "or float32 where that is bfloat16, beside float32 masters of the weights. Gradients are freed after each update.",
    "Activations: everything autograd keeps for the largest micro-batch (with model.gradient_checkpointing the input "
    "of every layer and all of one), attention without stored scores; with layout=padded rows are padded to the "
    "longest. Images of the micro-batch's prompts go through the vision tower once each.",
    "A response is as long as its limit allows; a demonstration's response is taken as eval.max_new_tokens long, a "
    "teacher's as long as a rollout. Caption and reasoning of one response share its length, padded each to all of it.",
    "Rollouts and evaluation keep a cache of rollout.tokens_in_flight tokens at most; while it grows, one layer's keys "
    "or values exist twice. Sampling holds 32 bytes per response and entry of the vocabulary, in slices of responses. "
    "With rollout.engine=vllm the whole cache and a copy of the weights exist meanwhile, on a CPU always.",
    "Not counted: rollout.offload, vLLM's activations, buffers inside single operations, copies made while loading and "
    "saving, fragmentation, the CUDA context (about 0.5 GiB), Python itself.",
)


@dataclass(frozen=True)
class Component:
    name: str
    bytes: int


@dataclass(frozen=True)
class Phase:
    """The components in memory at one time."""

    name: str
    components: tuple[Component, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.components)


@dataclass(frozen=True)
class StagePlan:
    stage: str
    phases: tuple[Phase, ...]
    tokens: dict[str, int]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)


@dataclass(frozen=True)
class Plan:
    recipe: str
    dtype: str
    device: str
    prompt_tokens: int
    image_tokens: int
    policy: ModelSize
    discriminator: ModelSize | None
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]
    card: str | None = None  # one of CARDS: the plan says whether the recipe fits on it

    @property
    def fits(self) -> bool | None:
        return None if self.card is None else all(stage.peak.bytes <= _usable(self.card) for stage in self.stages)

    def verdict(self) -> str:
        """Whether the stages fit on the card, with bytes; for a stage that does not, in which phase and by how much."""
        assert self.card is not None
        on = f"{shown_bytes(_usable(self.card))} of {shown_bytes(CARDS[self.card])} (a twentieth is left free)"
        peaks = [f"{s.stage} {shown_bytes(s.peak.bytes)} ({s.peak.name})" for s in self.stages]
        if self.fits:
            return f"It fits on {self.card}, {on}: {', '.join(peaks)}."
        missing, parts = [], set()
        for stage in self.stages:
            for phase in stage.phases:
                if phase.bytes > _usable(self.card):
                    largest = max(phase.components, key=lambda part: part.bytes)
                    missing.append(
                        f"{stage.stage}, {phase.name}: {shown_bytes(phase.bytes)}, of which {largest.name} "
                        f"{shown_bytes(largest.bytes)}"
                    )
                    parts |= {part.name for part in phase.components}
        cures = []
        if any(name.endswith("activations") for name in parts):
            cures += ["model.gradient_checkpointing=true", "a smaller tokens_per_micro_batch"]
        if "KV cache" in parts:
            cures.append("a smaller rollout.tokens_in_flight")
        return f"It does not fit on {self.card}, {on}: {'; '.join(missing)}. Less takes: {', '.join(cures)}."

    def as_json(self) -> str:
        plain = asdict(self) | {"card_bytes": None if self.card is None else CARDS[self.card], "fits": self.fits}
        for stage, made in zip(plain["stages"], self.stages, strict=True):
            stage["peak_phase"], stage["peak_bytes"] = made.peak.name, made.peak.bytes
            for phase, computed in zip(stage["phases"], made.phases, strict=True):
                phase["bytes"] = computed.bytes
        return json.dumps(plain, indent=2)


def _usable(card: str) -> int:
    return CARDS[card] * 19 // 20


def adamw_bytes(size: ModelSize) -> int:
    """Two moments in the masters' dtype and one float32 step count per tensor (fused ``torch.optim.AdamW``)."""
    return 2 * size.gradient_bytes + 4 * size.tensors


def trained_size(config: Config, dense: Qwen3VLConfig, stage: str) -> ModelSize:
    """Size of the policy as ``stage`` trains it. Raises as ``train.adapt.adapt``."""
    return policy_size(dense, DTYPES[config.model.dtype], lambda policy: adapt(config, policy, stage))


def discriminator_tokens(prompts: int, n: int, prompt: int, response: int, *, spans: int, layout: Layout) -> int:
    """Tokens of one discriminator forward over a step: for each prompt, the scored ``spans`` (caption and reasoning, or
    the whole response) of ``n`` students and of the teacher, the prompt once for all or before each of them.
    ``response``: tokens of one response in all."""
    return prompts * (n + 1) * response + prompt * prompts * (1 if layout == "shared_prefix" else spans * (n + 1))


def policy_tokens(prompts: int, n: int, prompt: int, response: int, *, layout: Layout) -> int:
    """Tokens of one policy update: ``n`` responses to each prompt, the prompt once for all or before each of them."""
    return prompts * n * response + prompt * prompts * (1 if layout == "shared_prefix" else n)


def policy_config(config: Config) -> Qwen3VLConfig:
    """Configuration of the recipe's policy; of a folder, ``config.json`` is enough.

    Raises:
        ConfigError: the folder or its ``config.json`` is missing, or it is no dense Qwen3-VL.
    """
    tiny = config.model.tiny
    if config.model.policy == "tiny":
        sizes = asdict(tiny)
        vocabulary = sizes.pop("vocab_size")
        ids = {f"{name}_token_id": vocabulary - 1 for name in ("image", "video", "vision_start", "vision_end")}
        return tiny_config(TinyPolicy(**sizes), vocab_size=vocabulary, **ids)
    folder, family = _model_folder("policy", config.model.policy)
    return family.policy_config.from_pretrained(folder, local_files_only=True)


def discriminator_config(config: Config, policy: Qwen3VLConfig) -> Qwen3VLMoeConfig:
    """Configuration of the recipe's discriminator: upcycled from the policy, or a folder's (raises as above)."""
    if config.model.discriminator == "upcycle":
        return sparse_config(policy, config.warmup.upcycle.num_experts, config.warmup.upcycle.top_k)
    folder, family = _model_folder("discriminator", config.model.discriminator)
    return family.discriminator_config.from_pretrained(folder, local_files_only=True)


def _model_folder(role: Role, name: str) -> tuple[Path, Family]:
    folder, key = Path(name), f"model.{role}"
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{key}: {file} does not exist; give the folder of a checkpoint{how_to_get(name)}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {file} does not name a model_type ({error!r})") from error
    try:
        return folder, family_of(role, found, folder)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def check_positions(config: Config, policy: Qwen3VLConfig, *, prompt: int) -> None:
    """Raise ConfigError where a stage's longest response to ``prompt`` tokens of text has more positions than the
    policy knows."""
    known, tiny = policy.text_config.max_position_embeddings, config.model.policy == "tiny"
    limits: dict[str, SamplingConfig | WarmupConfig] = {
        f"{'align' if stage == 'align' else 'rlvr'}.rollout": sampling_of(config, stage)
        for stage in ("align", "rlvr", "rlvr_direct")
        if stage in config.stages
    }
    if "warmup" in config.stages and config.data.pairs is None:
        limits["warmup"] = config.warmup
    for key, limit in limits.items():
        if prompt + limit.max_new_tokens > known:
            whose = "the tiny policy, which model.policy names" if tiny else f"model.policy={config.model.policy}"
            cure = "name the policy that is meant with model.policy=PATH" if tiny else "give it a smaller value"
            raise ConfigError(
                f"{key}.max_new_tokens={limit.max_new_tokens} after a prompt of {prompt} tokens of text or more: "
                f"longer than the {known:,} positions of {whose}; {cure}"
            )


def make_plan(
    config: Config, *, prompt_tokens: int | None = None, image_tokens: int | None = None, card: str | None = None
) -> Plan:
    """Plan the recipe's stages for prompts of ``prompt_tokens`` (images expanded), ``image_tokens`` of them from images
    (merged patches; default half, or what ``DEFAULT_TOKENS`` says), on this machine or on a ``card`` of ``CARDS``.

    Raises:
        ConfigError: a model folder is wrong (see :func:`policy_config`), the lengths are not positive, or the card is
            not known.
    """
    if card is not None and card not in CARDS:
        raise ConfigError(f"--card must be one of {', '.join(CARDS)}, got {card!r}")
    prompt, images = DEFAULT_TOKENS[config.data.source]
    if prompt_tokens is not None:
        prompt, images = prompt_tokens, prompt_tokens // 2
    if image_tokens is not None:
        images = image_tokens
    if prompt < 1 or not 0 <= images <= prompt:
        raise ConfigError(f"need 1 <= prompt tokens and 0 <= image tokens <= prompt tokens, got {prompt} and {images}")
    planner = _Planner(config, prompt, images, card)
    check_positions(config, planner.dense, prompt=1 if prompt_tokens is None else prompt - images)
    stages = tuple(planner.stage(name) for name in config.stages)
    assumed = f"A prompt has {prompt} tokens, {images} of them from images" + (
        " (assumed; --prompt-tokens and --image-tokens set them)." if prompt_tokens is None else "."
    )
    vocabulary = "The tiny policy's tokenizer fills its vocabulary." if config.model.policy == "tiny" else None
    return Plan(
        recipe=config.recipe,
        dtype=config.model.dtype,
        device=planner.device,
        prompt_tokens=prompt,
        image_tokens=images,
        policy=planner.plain,
        discriminator=planner.discriminator if {"warmup", "align"} & set(config.stages) else None,
        stages=stages,
        assumptions=tuple(filter(None, (assumed, vocabulary, *ASSUMPTIONS))),
        card=card,
    )


def summary(plan: Plan) -> Table:
    """One line per stage: its peak and the phase of the peak."""
    table = Table(title="memory peaks")
    for name in ("stage", "phase", "peak"):
        table.add_column(name, justify="right" if name == "peak" else "left")
    for stage in plan.stages:
        table.add_row(stage.stage, stage.peak.name, shown_bytes(stage.peak.bytes))
    return table


def render(plan: Plan) -> RenderableType:
    """The whole plan for a terminal."""
    models = Table(title=f"parameters ({plan.dtype} weights)")
    for name in ("model", "all", "vision", "embedding", "experts", "active per token", "weights"):
        models.add_column(name, justify="left" if name == "model" else "right")
    for name, size in (("policy", plan.policy), ("discriminator", plan.discriminator)):
        if size is not None:
            counts = (size.parameters, size.vision, size.embedding, size.experts, size.active)
            models.add_row(name, *(f"{count:,}" for count in counts), shown_bytes(size.weight_bytes))
    memory = Table(title=f"memory on {plan.device}")
    for name in ("stage", "phase", "component", "size"):
        memory.add_column(name, justify="right" if name == "size" else "left")
    tokens = Table(title="tokens per step")
    for name in ("stage", "what", "tokens"):
        tokens.add_column(name, justify="right" if name == "tokens" else "left")
    for stage in plan.stages:
        for phase in stage.phases:
            total = "sum (peak of the stage)" if phase is stage.peak else "sum"
            memory.add_row(stage.stage, phase.name, total, shown_bytes(phase.bytes), style="bold")
            for part in phase.components:
                memory.add_row("", "", part.name, shown_bytes(part.bytes))
        memory.add_section()
        for what, count in stage.tokens.items():
            tokens.add_row(stage.stage, what, f"{count:,}")
    verdict = [] if plan.card is None else [plan.verdict()]
    return Group(models, memory, tokens, "Assumptions:", *(f"- {text}" for text in plan.assumptions), *verdict)


class _Planner:
    """The arithmetic of one recipe at fixed lengths."""

    def __init__(self, config: Config, prompt: int, images: int, card: str | None) -> None:
        self.config, self.prompt, self.images = config, prompt, images
        self.dtype = DTYPES[config.model.dtype]
        self.keeps = {"checkpointing": config.model.gradient_checkpointing}
        self.card, self.device = card, config.device
        if card is not None:
            self.device = "cuda"
        elif config.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dense = policy_config(config)
        self.sparse = discriminator_config(config, self.dense)
        self.spans = len(SPANS[config.align.discriminate])
        self.plain = self.policy = policy_size(self.dense, self.dtype)
        self.discriminator = discriminator_size(self.sparse, self.dtype)

    def stage(self, name: str) -> StagePlan:
        self.policy = self.plain if name == "warmup" else trained_size(self.config, self.dense, name)
        made: Callable[[], StagePlan] = getattr(self, f"_{name}")
        return made()

    # Stages, each with its resident components first.

    def _sft(self, name: str = "sft") -> StagePlan:
        sft, response = self.config.sft, self.config.eval.max_new_tokens
        update = self._policy_update(sft.batch, 1, response, sft.tokens_per_micro_batch)
        tokens = {"policy update": sft.batch * (self.prompt + response)}
        return StagePlan(name, (Phase("update", (*self._held("policy", self.policy), *update)), *self._eval()), tokens)

    def _sft_continued(self) -> StagePlan:
        return self._sft("sft_continued")

    def _warmup(self) -> StagePlan:
        warmup, evaluation = self.config.warmup, self.config.eval
        policy = Component("policy weights", self.policy.weight_bytes)
        phases = []
        if self.config.data.pairs is None:
            rows = max(1, evaluation.batch // warmup.pairs_per_prompt) * warmup.pairs_per_prompt
            phases.append(Phase("pairs", (policy, *self._generation(rows, warmup.max_new_tokens))))
        update = self._discriminator_update(
            warmup.prompts, warmup.pairs_per_prompt, warmup.max_new_tokens, warmup.tokens_per_micro_batch
        )
        phases.append(Phase("update", (policy, *self._held("discriminator", self.discriminator), *update)))
        tokens = self._discriminator_tokens(warmup.prompts, warmup.pairs_per_prompt, warmup.max_new_tokens)
        return StagePlan("warmup", tuple(phases), {"discriminator": tokens})

    def _align(self) -> StagePlan:
        align = self.config.align
        n, response, rows = align.rollout.n, align.rollout.max_new_tokens, align.prompts * align.rollout.n
        held = (*self._held("policy", self.policy), *self._held("discriminator", self.discriminator))
        held += self._reference(align.loss_terms)
        update = self._discriminator_update(align.prompts, n, response, align.discriminator.tokens_per_micro_batch)
        policy = self._policy_update(align.prompts, n, response, align.tokens_per_micro_batch)
        phases = (
            Phase("rollout", (*held, *self._generation(rows, response))),
            Phase("discriminator update", (*held, *update)),
            Phase("policy update", (*held, *policy)),
            *self._eval(),
        )
        tokens = self._rollout_tokens(align.prompts, n, response)
        tokens["discriminator"] = align.discriminator.updates * self._discriminator_tokens(align.prompts, n, response)
        return StagePlan("align", phases, tokens)

    def _rlvr(self, name: str = "rlvr") -> StagePlan:
        rlvr = self.config.rlvr
        response, n = rlvr.rollout.max_new_tokens, rlvr.rollout.n
        dynamic = rlvr.dynamic_sampling
        round_of = int(dynamic.max_oversampling * rlvr.prompts) if dynamic.enabled else rlvr.prompts
        held = self._held("policy", self.policy) + self._reference(rlvr.loss_terms)
        policy = self._policy_update(rlvr.prompts, n, response, rlvr.tokens_per_micro_batch)
        phases = (
            Phase("rollout", (*held, *self._generation(round_of * n, response))),
            Phase("policy update", (*held, *policy)),
            *self._eval(),
        )
        return StagePlan(name, phases, self._rollout_tokens(rlvr.prompts, n, response))

    def _rlvr_direct(self) -> StagePlan:
        return self._rlvr("rlvr_direct")

    # Parts of phases.

    def _held(self, name: str, size: ModelSize) -> tuple[Component, ...]:
        masters = [Component(f"{name} masters", size.master_bytes)] if size.master_bytes else []
        return (
            Component(f"{name} weights", size.weight_bytes),
            *masters,
            Component(f"{name} optimizer", adamw_bytes(size)),
        )

    def _reference(self, terms: LossTermsConfig) -> tuple[Component, ...]:
        """The copy that a KL term needs; with adapters the policy is its own reference."""
        copied = terms.kl_coef and not self.config.model.lora.rank
        return (Component("reference weights", self.plain.weight_bytes),) if copied else ()

    def _eval(self) -> tuple[Phase, ...]:
        """Evaluation of the policy that the stage trained, which is still in memory."""
        if self.config.data.source == "files" and self.config.data.eval is None:
            return ()
        evaluation = self.config.eval
        weights = Component("policy weights", self.policy.weight_bytes)
        return (Phase("evaluation", (weights, *self._generation(evaluation.batch, evaluation.max_new_tokens))),)

    def _generation(self, rows: int, response: int) -> tuple[Component, ...]:
        text = self.dense.text_config
        if self.config.rollout.engine == "vllm":
            cache = cache_bytes(text, self.dtype, self.config.rollout.tokens_in_flight)
            return (Component("vLLM weights", self.plain.weight_bytes), Component("KV cache", cache))
        at_once = max(1, self.config.rollout.tokens_in_flight // (self.prompt + response))
        rows = min(rows, at_once)
        cache = rows * (self.prompt + response) * kv_bytes_per_token(text, self.dtype)
        return (
            Component("KV cache", cache),
            Component("KV cache growth", cache // (2 * text.num_hidden_layers)),
            Component("sampling scores", 32 * min(rows * text.vocab_size, max(text.vocab_size, SCORES_AT_ONCE))),
        )

    def _policy_update(self, prompts: int, n: int, response: int, budget: int) -> tuple[Component, ...]:
        text, layout = self.dense.text_config, self.config.layout
        images, rows = self._micro_batch(prompts, n, response, budget, layout)
        computed = rows * response + self.prompt * (images if layout == "shared_prefix" else rows)
        # The output head forms its gradients in the forward: of its inputs, and of its matrix in float32.
        formed = rows * response * text.hidden_size * self.dtype.itemsize
        formed += 4 * text.vocab_size * text.hidden_size if self.policy.head_learns else 0
        activations = language_activation_bytes(text, computed, self.dtype, **self.keeps)
        adapters = computed * self.policy.adapter_rows * self.dtype.itemsize
        adapters //= text.num_hidden_layers if self.config.model.gradient_checkpointing else 1  # those of one layer
        return (
            Component("policy gradients", self.policy.gradient_bytes),
            Component("policy activations", activations + adapters),
            self._vision(images if self.policy.vision_learns else 0),
            Component("gradients formed in the output head", formed),
            Component("scores of the vocabulary, one wave", self._wave_bytes(rows * response)),
        )

    def _wave_bytes(self, rows: int) -> int:
        vocabulary, device = self.dense.text_config.vocab_size, torch.device(self.device)
        if device.type == "cpu":  # the reference computes in float32 at least
            at_once = min(rows, block_rows(vocabulary, torch.empty(0, dtype=self.dtype)))
            return at_once * vocabulary * max(4, self.dtype.itemsize)
        if self.card is not None:
            room = budgets.wave_bytes_of(CARDS[self.card])
        elif device.type == "cuda" and not torch.cuda.is_available():  # a plan for another machine: a large card
            room = budgets.WAVE_BYTES_LARGE
        else:
            room = budgets.wave_bytes(device)
        return min(room, rows * vocabulary * self.dtype.itemsize)

    def _micro_batch(self, prompts: int, n: int, response: int, budget: int, layout: Layout) -> tuple[int, int]:
        """Prompts and responses in the largest micro-batch of a policy update; a response longer than the budget has
        one of its own."""
        group = self.prompt + n * response
        if layout == "padded":
            rows = max(1, min(prompts * n, budget // (self.prompt + response)))
            return min(rows, prompts), rows
        if group <= budget:
            together = min(prompts, budget // group)
            return together, together * n
        return 1, max(1, (budget - self.prompt) // response)

    def _discriminator_update(self, prompts: int, n: int, response: int, budget: int) -> tuple[Component, ...]:
        group = self._discriminator_tokens(1, n, response)
        together = max(1, min(prompts, budget // group))
        if self.config.layout == "shared_prefix":  # a group larger than the budget is cut
            computed = together * group if group <= budget else max(budget, self.prompt + response)
        else:  # a group is one micro-batch, each span padded to the longest
            computed = together * self.spans * (n + 1) * (self.prompt + response)
        scored = together * self.spans * (n + 1)
        text = self.sparse.text_config
        activations = language_activation_bytes(text, computed, self.dtype, sparse=True, scored=scored, **self.keeps)
        return (
            Component("discriminator gradients", self.discriminator.gradient_bytes),
            Component("discriminator activations", activations),
            self._vision(together),
        )

    def _discriminator_tokens(self, prompts: int, n: int, response: int) -> int:
        return discriminator_tokens(prompts, n, self.prompt, response, spans=self.spans, layout=self.config.layout)

    def _vision(self, prompts: int) -> Component:
        vision = self.dense.vision_config
        patches = prompts * self.images * vision.spatial_merge_size**2
        return Component("vision activations", vision_activation_bytes(vision, patches, self.dtype, **self.keeps))

    def _rollout_tokens(self, prompts: int, n: int, response: int) -> dict[str, int]:
        return {
            "prompts read": prompts * self.prompt,
            "tokens generated": prompts * n * response,
            "policy update": policy_tokens(prompts, n, self.prompt, response, layout=self.config.layout),
        }
