"""Out of memory: the step is done again in smaller pieces and means the same."""

from __future__ import annotations

import copy
import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from prism_fast.config import OptimizerConfig, load_config
from prism_fast.data.samples import Demonstration
from prism_fast.engine.local import LocalEngine
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import StepTooLargeError, TokenBudget, out_of_memory
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Completion
from prism_fast.train.checkpoint import read_checkpoint
from prism_fast.train.layouts import use_layout
from prism_fast.train.pipeline import run_stages
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.sft import encode
from tests.support.trainers import update_policy, update_sft
from tests.train.conftest import SMALL


def allocate_too_much() -> None:
    """What the allocator of this machine says when memory is gone."""
    torch.empty(1 << 62, dtype=torch.uint8)


class FailingEngine(LocalEngine):
    """Runs out of memory in the ``fail_at``-th backward pass, with that micro-batch's gradients already there."""

    fail_at = 0
    calls = 0

    def backward(self, loss, **made_of):
        super().backward(loss, **made_of)
        self.calls += 1
        if self.calls == self.fail_at:
            allocate_too_much()

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}
        return super().step()


def test_the_allocators_errors_are_told_from_others():
    with pytest.raises(RuntimeError) as failed:
        allocate_too_much()
    for error in (failed.value, torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory")):
        assert out_of_memory(error)
    for error in (RuntimeError("shape '[2]' is invalid"), ValueError("can't allocate memory"), KeyboardInterrupt()):
        assert not out_of_memory(error)


@pytest.fixture(scope="module")
def setup():
    processor = Processor.build(train_tokenizer(["<caption>\n- digits: 1 2\n</caption>"] * 9, 320))
    return processor, build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)


def _policy_step(setup, tokens: int, fail_at: int = 0):
    processor, policy = setup
    engine = FailingEngine(copy.deepcopy(policy), OptimizerConfig(lr=1e-3))
    engine.fail_at = fail_at
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two of them")]
    generator = torch.Generator().manual_seed(9)
    lengths = [3, 30, 7, 12, 22, 5]
    completions = [
        Completion(tuple(torch.randint(0, 200, (n,), generator=generator).tolist()), (-1.0,) * n, 1.0, "stop")
        for n in lengths
    ]
    told: list[str] = []
    budget = TokenBudget(tokens, notify=told.append)
    numbers = update_policy(
        engine,
        PolicyBatch(prompts, [0, 0, 0, 1, 1, 1], completions, torch.tensor([0.5, -1.0, 0.3, 2.0, -0.3, 0.7])),
        PolicyLossOptions("grpo"),
        temperature=1.0,
        pad_id=processor.pad_id,
        budget=budget,
        layout="padded",
    )
    return engine, numbers, told, budget


def _sft_step(setup, tokens: int, fail_at: int = 0):
    processor, policy = setup
    engine = FailingEngine(copy.deepcopy(policy), OptimizerConfig(lr=1e-3))
    engine.fail_at = fail_at
    texts = ("1", "1 2 3 1 2 3 1 2 3 1 2 3", "- digits", "</caption>\n- digits: 1 2")
    demos = [Demonstration(str(i), [{"role": "user", "content": t}], t, []) for i, t in enumerate(texts)]
    told: list[str] = []
    budget = TokenBudget(tokens, notify=told.append)
    use_layout("shared_prefix", engine.module)
    settings = {"layout": "shared_prefix", "pad_id": processor.pad_id}
    return engine, update_sft(engine, encode(demos, processor), budget, **settings), told, budget


@pytest.mark.parametrize(("step", "tokens"), [(_policy_step, 96), (_sft_step, 100)])
@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_step_that_ran_out_of_memory_is_the_step_with_half_the_budget(setup, step, tokens, fail_at):
    full, whole = step(setup, tokens)[:2]
    again, numbers, told, budget = step(setup, tokens, fail_at)
    half, expected = step(setup, tokens // 2)[:2]
    assert again.calls - fail_at == half.calls > full.calls, "both cuts must differ for the test to say anything"
    for (name, p), q in zip(again.module.named_parameters(), half.module.parameters(), strict=True):
        assert torch.equal(p, q), name
    largest = max(g.abs().max() for g in full.gradients.values())
    for name, gradient in again.gradients.items():
        assert torch.equal(gradient, half.gradients[name]), name
        torch.testing.assert_close(gradient, full.gradients[name], rtol=0, atol=1e-6 * float(largest))
    # The check of packed rows ran before, with another budget: other rounding.
    changed = {key for key in numbers if numbers[key] != expected.get(key) and not key.endswith("packing_error")}
    assert budget.tokens == tokens // 2 and changed == {next(key for key in numbers if key.endswith("token_budget"))}
    assert numbers[changed.pop()] == tokens // 2 and budget.change() is None, "the metric is written once"
    assert len(told) == 1 and f"{tokens // 2} tokens" in told[0] and "alloc" in told[0]
    loss = next(key for key in numbers if key.endswith("/loss"))
    assert numbers[loss] == pytest.approx(whole[loss], abs=1e-6)


def test_what_does_not_fit_alone_says_what_to_do():
    told: list[str] = []
    budget = TokenBudget(100, notify=told.append)
    discarded: list[int] = []

    def attempt(tokens: int) -> None:
        discarded.append(tokens)
        allocate_too_much()

    with pytest.raises(StepTooLargeError, match="max_new_tokens.*prism-fast plan"):
        budget.run(attempt, discard=lambda: discarded.append(0), longest=30)
    assert discarded == [100, 0, 50, 0, 25, 0] and len(told) == 2


def test_other_errors_pass_and_random_numbers_are_drawn_again():
    budget = TokenBudget(10, notify=lambda text: None)
    with pytest.raises(ZeroDivisionError):
        budget.run(lambda tokens: 1 // 0, discard=pytest.fail)
    with pytest.raises(RuntimeError, match="shape"):
        budget.run(lambda tokens: torch.zeros(3).view(2), discard=pytest.fail)
    drawn: list[torch.Tensor] = []

    def attempt(tokens: int) -> None:
        drawn.append(torch.rand(4))
        if len(drawn) == 1:
            allocate_too_much()

    budget.run(attempt, discard=lambda: None)
    assert torch.equal(drawn[0], drawn[1]) and budget.tokens == 5


def test_a_budget_of_a_checkpoint_goes_on():
    budget = TokenBudget(100, notify=pytest.fail)
    budget.restore(25)
    assert budget.tokens == 25 and budget.change() is None
    with pytest.raises(ValueError, match="1 or more"):
        TokenBudget(0, notify=pytest.fail)


def test_memory_that_runs_out_in_generation_is_told_and_kept_in_the_checkpoint(
    small_data, finished, tmp_path, monkeypatch
):
    inner, room = HFRollout._decode, 300

    def decode(self, prompts, prompt_of_row, keys, sampling, poll):
        if len(keys) * (max(len(prompts[p].input_ids) for p in prompt_of_row) + sampling.max_new_tokens) > room:
            allocate_too_much()
        return inner(self, prompts, prompt_of_row, keys, sampling, poll)

    monkeypatch.setattr(HFRollout, "_decode", decode)
    folder, told = tmp_path / "run", io.StringIO()
    only = ["stages=[rlvr]", f"model.policy={finished / 'export' / 'sft_continued'}", "data.eval=null"]
    overrides = [*small_data, *SMALL, *only, "rollout.tokens_in_flight=1200", "rlvr.steps=2", f"out={folder}"]
    run_stages(load_config("digits", overrides), Console(file=told, width=1000))
    assert "generation: out of memory" in told.getvalue() and "300 tokens per chunk of responses" in told.getvalue()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("rollout/token_budget") for line in lines if line["stage"] == "rlvr"] == [300, None], "once"
    saved = read_checkpoint(folder / "checkpoints" / "rlvr-000002")
    assert saved.state["budgets"]["rollout"] == 300
    (folder / "record.json").unlink()  # as if it had been stopped behind its last step
    shutil.rmtree(folder / "export")
    monkeypatch.setattr(TokenBudget, "restore", lambda budget, tokens: restored.append(tokens))
    restored: list[int] = []
    run_stages(load_config(str(folder / "config.yaml")), Console(quiet=True), resume=True)
    assert restored[0] == 1200 and 300 in restored[1:]
