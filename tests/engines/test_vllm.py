"""vLLM as rollout engine: the contract of rollout engines, one preprocessing, every push, nothing left behind.

One engine serves all tests, as vLLM takes half a minute to start. Of the contract all holds but that equal seeds give
equal ids under any rounding: the checks below compare small prompts in float32, where none was seen to differ.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.engines import engine_maker
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Sampling
from tests.contracts.rollout import CHECKS, SEEDS, Case, flat, texts

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

import prism_fast.rollout.vllm as module
from prism_fast.rollout.vllm import VLLMRollout, request_of

pytestmark = pytest.mark.timeout(600)
GREATEST = 1e-4  # nats, in float32


def _global_state():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
    )


@pytest.fixture(scope="module")
def built():
    """(case, the global state before the engine was built, that after it)."""
    processor = Processor.build(train_tokenizer(["<caption>\n- digits 1 2 3\n</caption>\n the sum is 4"] * 20, 320))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=5)
    budget = TokenBudget(1 << 16, notify=lambda text: None)
    options = {"max_model_len": 512}
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # as in a run
    before = _global_state()
    engine = engine_maker("vllm", options)(policy, processor, budget)
    after = _global_state()

    def another() -> VLLMRollout:
        """One that shares nothing with the engine under test: two in one process share vLLM's global state."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "build_llm", lambda *_: Recorded())
            return VLLMRollout(policy, processor, budget, options)

    yield Case(policy, processor, engine, another, GREATEST), before, after
    engine.close()
    torch.use_deterministic_algorithms(strict)


@pytest.fixture
def case(built):
    return built[0]


class Recorded:
    """In place of ``vllm.LLM``: writes down what it is told."""

    def __init__(self):
        self.told, self.sums = [], {"a weight": "1"}
        self.llm_engine = self.engine_core = self._finalizer = self

    def collective_rpc(self, name, kwargs=None):
        if name == "compute_weight_checksums":
            return [dict(self.sums)]
        self.told.append((name, [weight for weight, _ in kwargs["weights_iterator"]]))

    def __getattr__(self, name):
        return lambda **how: self.told.append((name, *how.values()))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check, case):
    check(case)


def test_construction_leaves_the_process_as_it_was(built):
    _, before, after = built
    assert after == before


def test_vllm_sees_the_trainers_ids_and_pixels(case):
    """Also of images that are resized, are not RGB, and follow each other."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 101, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "digits"}, {"type": "image"}]
    prompt = case.processor.encode_prompt(
        [{"role": "user", "content": content}], [image, image.convert("L"), image.convert("RGBA").rotate(90)]
    )
    sent = request_of(prompt, case.processor)
    assert sent["prompt_token_ids"].count(case.processor.image_token_id) == 3
    assert [image.size for image in sent["multi_modal_data"]["image"]] != [image.size for image in prompt.images]
    ours = replace(case)
    ours.prompts = [prompt]
    ours.assert_logprobs(ours.generate([prompt], Sampling(4, 1.0, 12), [7]), 1.0)


def test_other_ids_are_refused(case):
    prompt, pad = case.prompts[1], case.processor.image_token_id
    place = prompt.input_ids.index(pad)
    longer = replace(prompt, input_ids=(*prompt.input_ids[:place], pad, *prompt.input_ids[place:]))
    with pytest.raises(RuntimeError, match="prompt tokens where the trainer sees"):
        case.generate([longer], Sampling(1, 1.0, 2), [1])
    assert not case.engine._llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("name", ["model.language_model.embed_tokens.weight", "model.visual.merger.linear_fc2.weight"])
def test_two_pushes_are_both_seen(name, case):
    assert case.policy.lm_head.weight is case.policy.get_input_embeddings().weight, "the case needs a tied policy"
    sampling, seen = Sampling(2, 1.0, 12), []
    for factor in (1.3, 0.8):
        with case.changed(lambda policy, factor=factor: policy.get_parameter(name).mul_(factor)):
            groups = case.generate(case.prompts, sampling, SEEDS)
            case.assert_logprobs(groups, 1.0)
            seen.append(flat(groups)[-1].logprobs)
    assert seen[0] != seen[1]


def test_a_push_that_does_not_arrive_is_noticed(case, monkeypatch):
    """The tied output matrix under one name only: vLLM for CPUs keeps the old one."""
    engine = case.engine
    monkeypatch.setattr(engine, "_pushes", 0)
    monkeypatch.setattr(engine, "_with_tied", lambda weights: ((name, w.detach().clone()) for name, w in weights))
    rng = torch.Generator().manual_seed(3)
    with case.changed(lambda policy: policy.lm_head.weight.add_(0.02 * torch.randn(320, 128, generator=rng)[:289])):
        with pytest.raises(RuntimeError, match="did not arrive"):
            case.generate(case.prompts, Sampling(1, 1.0, 8), SEEDS)
        monkeypatch.undo()


def test_an_empty_shard_is_refused(case):
    with pytest.raises(ValueError, match="embed_tokens.*gather"):
        case.engine.sync(iter([("model.language_model.embed_tokens.weight", torch.empty(0))]))
    case.generate(case.prompts, Sampling(1, 1.0, 2), SEEDS)  # from the attached module again


def test_no_banned_token_among_ten_thousand(case, monkeypatch):
    """At temperature 2; without the ban some are sampled."""
    banned, sampling = set(case.processor.banned_ids), Sampling(128, 2.0, 32)

    drawn = [t for c in flat(case.generate(case.prompts, sampling, SEEDS)) for t in c.token_ids]
    drawn += [t for c in flat(case.generate(case.prompts, sampling, (1, 2, 3))) for t in c.token_ids]
    assert len(drawn) >= 10_000 and not banned & set(drawn)
    monkeypatch.setattr(module, "BAN", 0.0)
    with pytest.raises(RuntimeError, match="sampled .* which are banned"):
        case.generate(case.prompts, sampling, SEEDS)


def test_the_end_rule_is_that_of_the_embedded_engine(case):
    """An end token that is all but certain comes as the only token of a response, in both engines."""
    hf = HFRollout(case.policy, case.processor, TokenBudget(1 << 16, notify=lambda text: None))
    for end in (case.processor.eos_id, case.processor.pad_id):
        with case.changed(case.raised([end], 60.0)):
            for engine in (case.engine, hf):
                groups = engine.generate(case.prompts, Sampling(1, 0.0, 6), SEEDS, poll=lambda: None)
                assert texts(groups) == [[(end,)]] * 3
                assert {c.finish_reason for c in flat(groups)} == {"stop"}


def test_an_error_inside_a_step_leaves_no_request(case, monkeypatch):
    core = case.engine._llm.llm_engine
    sampling = Sampling(3, 1.0, 10)
    whole = texts(case.generate(case.prompts, sampling, SEEDS))
    step, calls = core.engine_core.engine_core.model_executor.execute_model, []

    def failing(*arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise OSError("played")
        return step(*arguments, **options)

    monkeypatch.setattr(core.engine_core.engine_core.model_executor, "execute_model", failing)
    with pytest.raises(OSError, match="played"):
        case.generate(case.prompts, sampling, SEEDS)
    assert not core.has_unfinished_requests()
    assert texts(case.generate(case.prompts, sampling, SEEDS)) == whole


def test_too_long_a_response_and_too_high_a_temperature_are_refused(case):
    with pytest.raises(ValueError, match=r"rollout\.vllm\.max_model_len"):
        case.generate(case.prompts, Sampling(1, 1.0, 512), SEEDS)
    with pytest.raises(ValueError, match="at most 2 .*hf"):
        case.generate(case.prompts, Sampling(1, 2.1, 4), SEEDS)


def test_sleep_frees_all_and_the_cache_returns_after_the_weights(case):
    """On a GPU, played: this engine's own calls."""
    engine = case.make()
    engine._sleeps = True
    engine._llm.told.clear()
    weights = [("model.language_model.embed_tokens.weight", torch.ones(1))]
    engine.sleep()
    engine.sleep()
    with pytest.raises(ValueError, match="asleep"):
        engine.sync(iter(weights))
    engine.wake()
    engine.sync(iter(weights))
    assert engine._llm.told == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("reload_weights", ["model.language_model.embed_tokens.weight", "lm_head.weight"]),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",),
        ("reset_mm_cache",),
        ("reset_encoder_cache",),
    ]
    engine.close()


def test_weights_that_change_as_they_are_loaded_again_are_refused(case, monkeypatch):
    class Twisting(Recorded):
        def __init__(self):
            super().__init__()
            self.pushes = 0

        def collective_rpc(self, name, kwargs=None):
            self.pushes += name == "reload_weights"
            self.sums["an expert"] = "twisted" if self.pushes == 2 else "as loaded"
            return super().collective_rpc(name, kwargs)

    monkeypatch.setattr(module, "build_llm", lambda *_: Twisting())
    with pytest.raises(RuntimeError, match=r"push 2 .* 1 of 2 tensors .*an expert"):
        VLLMRollout(case.policy, case.processor, TokenBudget(1 << 16, notify=lambda text: None))


def test_a_push_that_vllm_does_not_take_to_its_end_is_refused(case, monkeypatch):
    engine = case.make()
    monkeypatch.setattr(engine._llm, "collective_rpc", lambda name, kwargs: next(kwargs["weights_iterator"]))
    with pytest.raises(RuntimeError, match=r"did not take model\.b "):
        engine.sync(iter([("model.a", torch.ones(1)), ("model.b", torch.ones(1))]))
