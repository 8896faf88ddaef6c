"""Every weight is read in the forward of the module that owns it, and inside the engine's root: sharded training holds
a weight nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.discriminator_trainer import DiscriminatorLoss, DiscriminatorTrainer
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer
from prism_fast.train.scored_group import ScoredGroup
from prism_fast.train.sft import SftTrainer

TINY = TinyPolicy(num_layers=2, deepstack_layers=(0,))


@contextmanager
def sharded(engine: LocalEngine) -> Iterator[dict[str, int]]:
    """Weights are empty but inside a forward of their own module, which lies inside the root's. What a backward would
    need is not there: forwards alone. Counts the forwards that found each weight."""
    whole = {p: p.data for p in engine.module.parameters()}
    names = {p: name for name, p in engine.module.named_parameters()}
    depth: dict[torch.Tensor, int] = dict.fromkeys(whole, 0)
    inside = [0]
    read: dict[str, int] = {}

    def enter_root(module: nn.Module, args: tuple) -> None:
        inside[0] += 1

    def leave_root(module: nn.Module, args: tuple, output: object) -> None:
        inside[0] -= 1

    def enter(module: nn.Module, args: tuple) -> None:
        for p in module.parameters(recurse=False):
            assert inside[0], f"{names[p]} is read outside of engine.run"
            depth[p] += 1
            p.data = whole[p]
            read[names[p]] = read.get(names[p], 0) + 1

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        for p in module.parameters(recurse=False):
            depth[p] -= 1
            if not depth[p]:
                p.data = whole[p].new_empty(0)

    root = engine.root
    handles = [root.register_forward_pre_hook(enter_root), root.register_forward_hook(leave_root)]
    for module in engine.module.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    for p in whole:
        p.data = whole[p].new_empty(0)
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
        for p, data in whole.items():
            p.data = data


@pytest.fixture(scope="module")
def processor():
    return Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))


@pytest.fixture(scope="module")
def prompt(processor):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    return processor.encode_prompt([{"role": "user", "content": content}], [image])


def engine_of(model: nn.Module) -> LocalEngine:
    """Backward does nothing: weights are not there for it."""
    engine = LocalEngine(model, OptimizerConfig())
    engine.packing_checked = True
    engine.backward = lambda loss, **made_of: None
    return engine


def expected(model: nn.Module, *never: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if not name.startswith(never)}


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_policy(processor, prompt, layout):
    policy = build_tiny_policy(processor, TINY, seed=1)
    use_layout(layout, policy)
    engine = engine_of(policy)
    batching = Batching(layout, TokenBudget(10**6, notify=pytest.fail), processor.pad_id)
    options = policy_options("grpo", max_response=9)
    trainer = PolicyTrainer(engine, batching, options, temperature=1.0, banned=processor.banned_ids)
    completions = [Completion((5, 6, 7), (-5.0,) * 3, 1.0, "stop"), Completion((8,), (-5.0,), 1.0, "stop")]
    with sharded(engine) as read:
        trainer.accumulate(PolicyBatch([prompt], [0, 0], completions, torch.tensor([1.0, -1.0])))
    assert set(read) == expected(policy)
    sft = SftTrainer(engine, batching)
    with sharded(engine) as read:
        sft.accumulate([PromptGroup(prompt, [(5, 6, 7)])])
    assert set(read) == expected(policy)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_discriminator(processor, prompt, layout):
    discriminator = build_discriminator(build_tiny_policy(processor, TINY, seed=1), seed=2)
    use_layout(layout, discriminator.backbone)
    engine = engine_of(discriminator)
    batching = Batching(layout, TokenBudget(10**6, notify=pytest.fail), processor.pad_id, whole_groups=True)
    loss = DiscriminatorLoss(aux_coef=0.1)
    trainer = DiscriminatorTrainer(engine, batching, loss, spans=("caption", "reasoning"), prefix="disc/")
    group = ScoredGroup(prompt, ((5, 6), (7,)), [((8,), (9, 10)), None])
    with sharded(engine) as read:
        trainer.score_and_accumulate([group])
    assert set(read) == expected(discriminator)


def test_a_weight_that_is_read_outside_is_named(processor):
    engine = engine_of(build_tiny_policy(processor, TINY, seed=1))
    with sharded(engine), pytest.raises(AssertionError, match=r"embed_tokens.weight is read outside of engine.run"):
        engine.module.model.language_model.embed_tokens(torch.tensor([1]))
    with sharded(engine), pytest.raises(RuntimeError):  # an attribute of a child that is never called
        engine.run(lambda: torch.ones(1, TINY.hidden_size) @ engine.module.lm_head.weight.T)
