"""Cases for several ranks: the same rollouts for one process and for a world, in awkward splits and cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from prism_fast.algorithms.presets import policy_options
from prism_fast.engine.optimizer import OptimizerConfig
from prism_fast.engine.protocol import Engine, Update
from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.processor import Processor, Prompt
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.discriminator_trainer import DiscriminatorLoss, DiscriminatorTrainer
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.sft import SftTrainer
from tests.support.small_policy import SMALL

#: Without it most weights of a small model would stay whole under stage 3.
UNSHARDED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "reduce_bucket_size": 1_000_000,
    }
}
WHOLE = 10**6
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_norm=0.5, warmup_steps=2)
STEPS = 3
SPLITS = {
    "even": ((0, 1, 2), (3, 4, 5)),
    "uneven": ((0,), (1, 2, 3, 4, 5)),
    "no image": ((0, 1, 2, 3, 4), (5,)),
    "no valid row": ((0, 1, 2), (3, 4, 5)),
}


@dataclass(frozen=True)
class Case:
    """``split``: of the prompts over two ranks; ``tokens``: per micro-batch."""

    model: str  # policy, discriminator or sft
    split: str = "even"
    tokens: int = WHOLE
    layout: str = "shared_prefix"
    checkpointing: bool = False
    aux_coef: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.model, self.split, self.layout]
        words += ["cut"] if self.tokens < 100 else [f"{self.tokens} tokens"] if self.tokens < WHOLE else []
        words += ["checkpointing"] if self.checkpointing else []
        words += ["balance"] if self.aux_coef else []
        words += ["bfloat16"] if self.dtype == torch.bfloat16 else []
        return " ".join(words)


ROWS, CUT = 130, 60
CASES = [
    Case("policy"),
    Case("policy", layout="padded"),
    Case("policy", checkpointing=True),
    Case("policy", "uneven", ROWS),
    Case("policy", "uneven", ROWS, layout="padded"),
    Case("policy", "even", CUT),
    Case("policy", "uneven", CUT, checkpointing=True),
    Case("policy", "no image"),
    Case("policy", "no image", ROWS, layout="padded"),
    Case("policy", "no valid row"),
    Case("discriminator", aux_coef=0.5),
    Case("discriminator", layout="padded", aux_coef=0.5),
    Case("discriminator", "uneven", ROWS, aux_coef=0.5),
    Case("discriminator", "uneven", CUT, aux_coef=0.5),
    Case("discriminator", "uneven", CUT),
    Case("discriminator", "even", CUT, checkpointing=True),
    Case("discriminator", "no image", aux_coef=0.5),
    Case("discriminator", "no valid row", aux_coef=0.5),
    Case("sft", "uneven", ROWS),
    Case("sft", "no image", layout="padded"),
]
HALF = [
    Case("policy", "uneven", ROWS, dtype=torch.bfloat16),
    Case("discriminator", "uneven", layout="padded", dtype=torch.bfloat16),  # its head stays float32
]


class Dump(NamedTuple):
    """Prompts, for each the responses, their advantages, and spans of teacher and students."""

    processor: Processor
    prompts: list[Prompt]
    responses: list[list[Completion]]
    advantage: Tensor  # [prompts, responses]
    spans: list[list[tuple[tuple[int, ...], ...]]]


def dump() -> Dump:
    """The same in every process."""
    processor = Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))
    rng = np.random.default_rng(7)
    generator = torch.Generator().manual_seed(7)

    def words(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())

    prompts = []
    for sizes in (((64, 64),), ((96, 64),), (), ((32, 64), (64, 32)), ((64, 64),), ()):
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": f"and these {len(prompts)}?"}]
        prompts.append(processor.encode_prompt([{"role": "user", "content": content}], images))
    responses = [
        [Completion(ids, (-5.0,) * len(ids), 1.0, "stop") for ids in (words(4, 20) for _ in range(3))] for _ in prompts
    ]
    spans = [[(words(4, 12), words(6, 20)) for _ in range(3)] for _ in prompts]
    return Dump(processor, prompts, responses, torch.randn(len(prompts), 3, generator=generator), spans)


def model_of(case: Case, data: Dump, *, seed: int = 1) -> nn.Module:
    policy = build_tiny_policy(data.processor, SMALL, seed=seed)
    if case.model == "discriminator":
        model = build_discriminator(policy, seed=seed + 1, head_std=0.2)
        use_layout(case.layout, model.backbone)
    else:
        model = policy
        use_layout(case.layout, model)
    if case.checkpointing:
        use_gradient_checkpointing(model)
    model.to(case.dtype)
    if case.model == "discriminator":
        model.v_head.float()
    return model


class Step(NamedTuple):
    """``loss``: this rank's part of it; ``scores``: of a discriminator."""

    loss: float
    update: Update
    scores: tuple[Tensor, Tensor] | None


def stepper(case: Case, engine: Engine, data: Dump, mine: Sequence[int]) -> Callable[[], Step]:
    """A function that makes one update on the prompts ``mine``."""

    def told(text: str) -> None:
        raise AssertionError(text)

    batching = Batching(
        case.layout, TokenBudget(case.tokens, notify=told), data.processor.pad_id, whole_groups=case.model[0] == "d"
    )
    engine.packing_checked = True
    updates: list[Update] = []
    step = engine.step

    def recorded() -> Update:
        updates.append(step())
        return updates[-1]

    engine.step = recorded
    silent = SPLITS["no valid row"][1] if case.split == "no valid row" else ()
    prompts = [data.prompts[p] for p in mine]
    if case.model == "discriminator":
        trainer = DiscriminatorTrainer(
            engine,
            batching,
            DiscriminatorLoss(aux_coef=case.aux_coef),
            spans=("caption", "reasoning"),
            prefix="disc/",
        )
        groups = [
            ScoredGroup(data.prompts[p], teacher, [None, None] if p in silent else [first, second, None][: 2 + p % 2])
            for p in mine
            for teacher, first, second in [data.spans[p]]
        ]

        def discriminator() -> Step:
            found = trainer.score_and_accumulate(groups)
            trainer.step()
            return Step(found.metrics.read()["disc/loss"], updates[-1], (found.teacher, found.student))

        return discriminator
    if case.model == "sft":
        sft = SftTrainer(engine, batching)
        demos = [PromptGroup(data.prompts[p], [data.responses[p][0].token_ids]) for p in mine]

        def demonstrated() -> Step:
            metrics = sft.accumulate(demos) | sft.step()
            return Step(metrics.read()["sft/loss"], updates[-1], None)

        return demonstrated
    advantage = data.advantage[list(mine)].clone()
    for i, p in enumerate(mine):
        advantage[i] *= p not in silent
    batch = PolicyBatch(
        prompts,
        [i for i in range(len(mine)) for _ in range(3)],
        [completion for p in mine for completion in data.responses[p]],
        advantage.flatten(),
        [p == 1 and k == 1 for p in mine for k in range(3)] if case.split == "uneven" else None,
    )
    policy = PolicyTrainer(engine, batching, policy_options("grpo", max_response=20), temperature=1.0)

    def learned() -> Step:
        metrics = policy.accumulate(batch) | policy.step()
        return Step(metrics.read()["policy/loss"], updates[-1], None)

    return learned


class Outcome(NamedTuple):
    """``losses`` and gradient norms of all steps, gradients of the first, weights after the last, over all ranks."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    scores: Tensor | None


def outcome(
    case: Case,
    engine: Engine,
    data: Dump,
    mine: Sequence[int],
    gradients: Callable[[], dict[str, Tensor]],
    total: Callable[[float], float] = float,
) -> Outcome:
    """``gradients``: those of the last step, whole; ``total``: sum over the ranks. All ranks call them."""
    step = stepper(case, engine, data, mine)
    losses, norms, first, scores = [], [], {}, None
    for number in range(STEPS):
        made = step()
        losses.append(total(made.loss))
        norms.append(made.update.grad_norm)
        if number == 0:
            first = gradients()
            if made.scores is not None:
                scores = torch.cat([made.scores[0].flatten(), made.scores[1].flatten()])
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    return Outcome(losses, norms, first, weights, scores)
