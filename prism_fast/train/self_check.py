"""Packed rows against the padded layout, on a stage's own data and models, before the stage learns from them.

The check calls the functions that the stage calls and compares two things. First the states that the stage reads: of
response tokens for the policy, of the scored rows alone for the discriminator. Second the gradients of a few parameters
through which everything that packing does must pass: the first layer's norm (embeddings, image rows, attention), the
last layer's (scored rows), the vision tower's first norm and its first DeepStack merger's (image features, also where
rows share them). It does so twice: with rows as large as the stage's token budget, and with every group cut into
sub-groups. Heads and losses are not compared: both layouts run the same code there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prism_fast.config import Config
from prism_fast.data.samples import Demonstration, Pair, Task
from prism_fast.engine.protocol import Engine
from prism_fast.models.family import tower, trunk
from prism_fast.models.packing import Branch, PromptGroup
from prism_fast.models.processor import Processor
from prism_fast.train.batching import Batching
from prism_fast.train.layouts import BatchPlan, MicroBatch, PackedPlan, PaddedPlan, longest_item, use_layout

Read = Callable[[BatchPlan, MicroBatch], tuple[Tensor, Sequence[int]]]
"""Reads a micro-batch as the stage does: states [N, H], and how many of them belong to each of its branches."""

#: Largest accepted relative difference (root mean square) of states and of each gradient. Rounding is far below it in
#: float32 and float64; in half precision the two layouts differ more, because they sum in different orders.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: Smallest tolerance for a sparse model: at a near-tie the two layouts choose different experts. A wrong layout is off
#: by tenths.
SPARSE_TOLERANCE = 2e-2
CHECKED = (3, 2)  # branches of the first and of the second group


class PackingError(RuntimeError):
    """Packed and padded layout differ by more than rounding."""


def self_check(
    engine: Engine, batching: Batching, backbone: nn.Module, groups: Sequence[PromptGroup], read: Read
) -> float | None:
    """Run :func:`check_packing` once per engine, on a few branches of two groups of a step, those with images first.

    Returns:
        The largest relative difference at a stage's first update, for its metrics; otherwise None. A resumed engine is
        checked but gives None, because it must repeat the metrics of a run that was never stopped.

    Raises:
        PackingError: they differ by more than rounding explains.
    """
    some = choose(groups)
    if batching.layout == "padded" or engine.packing_checked or not some:
        return None
    error = check_packing(
        backbone,
        some,
        read,
        budget=batching.budget.tokens,
        pad_id=batching.pad_id,
        positions=batching.positions,
    )
    engine.packing_checked = True
    return error if engine.updates == 0 else None


def check_before_sharding(
    config: Config,
    backbone: nn.Module,
    samples: Sequence[Task | Demonstration | Pair],
    processor: Processor,
    read: Read,
    *,
    budget: int,
    positions: str = "mrope",
) -> None:
    """The check for an engine that shards weights: before it is made, while the model is whole. The branches are words
    of the first two prompts, as nothing is sampled yet; with other engines :func:`self_check` follows.

    Raises:
        PackingError: as :func:`check_packing`.
    """
    if config.engine.kind == "local" or config.layout == "padded":
        return
    use_layout(config.layout, backbone)
    groups = []
    for sample in (samples[i] for i in range(min(len(CHECKED), len(samples)))):
        prompt = processor.encode_prompt(sample.messages, sample.images)
        words = [token for token in prompt.input_ids if token not in processor.banned_ids]
        groups.append(PromptGroup(prompt, [words[:5], words[1:9], words[2:5]]))
    check_packing(backbone, choose(groups), read, budget=budget, pad_id=processor.pad_id, positions=positions)


def choose(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The groups in their order, with None for branches that are not checked; [] if there is no branch."""
    used = [g for g, group in enumerate(groups) if any(branch is not None for branch in group.branches)]
    used.sort(key=lambda g: (groups[g].prompt.pixel_values is None, g))
    limit = dict(zip(used, CHECKED, strict=False))
    if not limit:
        return []
    return [PromptGroup(group.prompt, _first(group.branches, limit.get(g, 0))) for g, group in enumerate(groups)]


def _first(branches: Sequence[Sequence[int] | None], count: int) -> list[Sequence[int] | None]:
    first = [b for b, branch in enumerate(branches) if branch is not None][:count]
    return [branch if b in first else None for b, branch in enumerate(branches)]


def check_packing(
    backbone: nn.Module,
    groups: Sequence[PromptGroup],
    read: Read,
    *,
    budget: int,
    pad_id: int,
    positions: str = "mrope",
    tolerance: float | None = None,
) -> float:
    """The largest relative difference between ``groups`` computed packed and one branch at a time.

    Leaves parameters, their ``.grad`` and ``requires_grad`` as they are. The padded layout runs one sequence at a time,
    so it needs no more memory than a row. Not for parameters sharded over ranks, whose gradients are not available.

    Args:
        backbone: ``Qwen3VLModel`` or ``Qwen3VLMoeModel`` with shared-prefix attention.
        budget: tokens per packed row.
        tolerance: relative; None: that of the backbone's dtype.

    Raises:
        PackingError: a difference above the tolerance, or one that is not finite.
    """
    if tolerance is None:
        sparse = getattr(backbone.config.text_config, "num_experts", None) is not None
        tolerance = max(TOLERANCE[backbone.dtype], SPARSE_TOLERANCE if sparse else 0.0)
    options = {"pad_id": pad_id, "positions": positions}
    alone = _compute(PaddedPlan(backbone, groups, 1, **options), read)
    worst = 0.0
    for name, tokens in (("", budget), (", groups cut into sub-groups", longest_item("shared_prefix", groups))):
        packed = _compute(PackedPlan(backbone, groups, tokens, positions=positions), read)
        errors = {key: _relative(packed.get(key), wanted) for key, wanted in alone.items()}
        worst = max(worst, *errors.values())
        wrong = [f"{key} {error:.2e}" for key, error in errors.items() if not error <= tolerance]
        if wrong:
            raise PackingError(
                f"packed and unshared computation of the same {len(alone['states'])} rows differ{name}: relative "
                f"difference of {', '.join(wrong)}, allowed {tolerance:.0e} for {backbone.dtype}. Training on packed "
                "rows would follow another gradient: set layout=padded, and report the versions of torch, transformers "
                "and the attention backend. (Compared before the first update: the states that the stage reads, and "
                "the gradients of norms of the first and the last layer and of the vision tower.)"
            )
    return worst


def _relative(actual: Tensor | None, expected: Tensor) -> float:
    actual = torch.zeros_like(expected) if actual is None else actual
    size = float(expected.norm())
    return float((actual - expected).norm()) / size if size else float(actual.norm())


def _compute(plan: BatchPlan, read: Read) -> dict[str, Tensor]:
    """``states`` [N, H] in the order of the branches and the gradient of each watched parameter, float64 on the CPU."""
    noise = torch.Generator()
    states: dict[Branch, Tensor] = {}
    with _watched(plan.backbone) as parameters, torch.set_grad_enabled(bool(parameters)):
        for batch in plan.micro_batches:
            rows, counts = read(plan, batch)
            upstream = []
            for branch, state in zip(batch.branches, rows.detach().double().cpu().split(list(counts)), strict=True):
                states[branch] = state
                noise.manual_seed(1009 * branch[0] + branch[1])  # the same for a branch in any layout
                upstream.append(torch.randn(state.shape, generator=noise))
            if rows.requires_grad:
                (rows * torch.cat(upstream).to(rows)).sum().backward()
                plan.finish(batch, torch.Tensor.backward)
        results = {"states": torch.cat([states[branch] for branch in sorted(states)])}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                results[f"gradient of {name}"] = parameter.grad.double().cpu()
    return results


@contextmanager
def _watched(backbone: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The watched parameters that are trained, by name; all of them where others alone are (adapters). Within the block
    only they get gradients, from zero; everything is restored afterwards."""
    language_model, visual = trunk(backbone), tower(backbone)
    named = {
        "the first layer's norm": language_model.layers[0].input_layernorm.weight,
        "the last layer's norm": language_model.layers[-1].post_attention_layernorm.weight,
        "the vision tower's first norm": visual.blocks[0].norm1.weight,
    }
    if visual.deepstack_merger_list:
        named["the first DeepStack merger's norm"] = visual.deepstack_merger_list[0].norm.weight
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    if any(parameter.requires_grad for parameter in named.values()) or not trained:
        named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    learns = {name: parameter.requires_grad for name, parameter in named.items()}
    before = {name: parameter.grad for name, parameter in named.items()}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for parameter in named.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        yield named
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for name, parameter in named.items():
            parameter.grad = before[name]
            parameter.requires_grad_(learns[name])
