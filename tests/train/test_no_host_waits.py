"""Between a step's first and last micro-batch the host reads nothing from the device: it would wait for the forwards
and backwards it has queued, and the device for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prism_fast
from prism_fast.algorithms.presets import policy_options
from prism_fast.config import OptimizerConfig
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.protocol import Completion
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from tests.support.trainers import discriminate, update_policy

PACKAGE = Path(prism_fast.__file__).parent
# What a GPU would have to be waited for. `.cpu()` of a CPU tensor leaves no trace: the test on a card sees that.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")


class HostReads(TorchDispatchMode):
    """Counts reads of tensors by (operator, file) where the nearest file of ours is not one of the ops: on the CPU
    their backends may read offsets, on a GPU their own tests forbid it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READS:
            frame = sys._getframe(1)
            while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                frame = frame.f_back
            where = "" if frame is None else str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
            if where and not where.startswith("ops/"):
                self.found[name, where] += 1
        return func(*args, **kwargs or {})


class Watched(TokenBudget):
    """A budget that watches what runs within it: reads on a CPU, any synchronisation on a card."""

    def __init__(self, tokens: int, device: torch.device):
        super().__init__(tokens, notify=pytest.fail)
        self.device, self.reads = device, HostReads()

    def run(self, attempt, **options):
        def watched(tokens: int):
            if self.device.type == "cpu":
                with self.reads:
                    return attempt(tokens)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return attempt(tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return super().run(watched, **options)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def setup():
    processor = Processor.build(train_tokenizer(["the sum is 4"] * 9, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two words")]
    return processor, policy, prompts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_policy_update(setup, loss, device):
    processor, policy, prompts = setup
    device = torch.device(device)
    policy.to(device)
    use_layout("shared_prefix", policy)
    completions = [Completion(tuple(range(5, 5 + n)), (-1.0,) * n, 1.0, "stop") for n in (3, 9, 5, 1, 7, 4)]
    advantage = torch.tensor([0.5, -1.0, 0.0, 1.5, -0.3, 0.7])
    engine = LocalEngine(policy, OptimizerConfig(lr=1e-3))
    for stale in (None, [True, False] * 3):
        budget = Watched(24, device)
        numbers = update_policy(
            engine,
            PolicyBatch(prompts, [0, 0, 0, 1, 1, 1], completions, advantage, stale),
            policy_options(loss, max_response=9),
            temperature=1.3,
            pad_id=processor.pad_id,
            budget=budget,
            layout="shared_prefix",
        )
        assert numbers["passes/policy_learned"] > 1 and not budget.reads.found


@pytest.mark.parametrize("device", DEVICES)
def test_discriminator_update(setup, device):
    processor, policy, prompts = setup
    device = torch.device(device)
    discriminator = build_discriminator(policy.cpu(), seed=1).to(device)
    use_layout("shared_prefix", discriminator.backbone)
    engine = LocalEngine(discriminator, OptimizerConfig(lr=1e-3))
    students = [((5, 6), (9,)), None, ((7,), (8, 9))]
    groups = [ScoredGroup(prompt, ((5, 6, 7), (8, 9)), students) for prompt in prompts]
    budget = Watched(40, device)
    options = {"semantics": "prism_fast", "score_clip": 10.0, "score_reg": 0.001, "length_penalty": 0.1}
    scores = discriminate(
        engine, groups, budget, learn=True, layout="shared_prefix", pad_id=processor.pad_id, **options
    )
    assert scores.passes.learned > 1 and not budget.reads.found


def test_the_watch_sees_a_read():
    watch = HostReads()
    code = compile("seen = bool(flag.any()), float(number), kept.nonzero()", str(PACKAGE / "train" / "x.py"), "exec")
    with watch:
        exec(code, {"flag": torch.ones(2, dtype=torch.bool), "number": torch.ones(()), "kept": torch.ones(3)})
    assert watch.found == {("_local_scalar_dense", "train/x.py"): 2, ("nonzero", "train/x.py"): 1}
