"""The embedded rollout engine beyond the contract: rows that leave, chunks under a budget, memory that runs out."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from prism_fast.models.policy import TinyPolicy, build_tiny_policy, load_policy, save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import StepTooLargeError
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout import hf
from prism_fast.rollout.protocol import Sampling, end_ids
from tests.contracts.rollout import Case, flat, texts
from tests.support.generation import generate, hf_engine


@pytest.fixture(scope="module")
def setup():
    tokenizer = train_tokenizer(["<caption>\n- digits 1 2 3\n</caption>\n the sum is 4"] * 20, 320)
    processor = Processor.build(tokenizer)
    model = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=5)
    noise = Image.effect_noise((128, 32), 50).convert("RGB")
    tall = Image.effect_noise((32, 96), 50).convert("RGB")
    image = {"type": "image"}

    def prompt(text: str, *images: Image.Image):
        content = [image] * len(images) + [{"type": "text", "text": text}]
        return processor.encode_prompt([{"role": "user", "content": content}], images)

    prompts = [prompt("digits", noise), prompt("the sum of the digits is", tall, noise), prompt("no image at all")]
    return model, processor, prompts


class CountedCache(DynamicCache):
    """Notes the most tokens that were in any cache, rows times columns."""

    most = 0

    def update(self, *arguments, **options):
        keys, values = super().update(*arguments, **options)
        CountedCache.most = max(CountedCache.most, keys.shape[0] * keys.shape[2])
        return keys, values


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(hf, "DynamicCache", CountedCache)
    CountedCache.most = 0
    return CountedCache


def test_rows_that_end_leave_the_batch_and_change_nothing(setup, monkeypatch):
    model, processor, prompts = setup
    case = Case(model, processor, hf_engine(model, processor), lambda: None, atol=0)
    with case.changed(case.raised([processor.eos_id, processor.pad_id], 4.0)):
        left = generate(model, processor, prompts, Sampling(16, 1.0, 40), seed=2)
        monkeypatch.setattr(hf, "COMPACT_BELOW", 0.0)
        kept = generate(model, processor, prompts, Sampling(16, 1.0, 40), seed=2)
    assert texts(left) == texts(kept)
    assert len({len(c.token_ids) for c in flat(left)}) > 3, "the case must have ragged endings"


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_scores_are_drawn_from_in_slices(setup, monkeypatch, rows):
    model, processor, prompts = setup
    whole = texts(generate(model, processor, prompts, Sampling(6, 1.0, 9)))
    monkeypatch.setattr(hf, "SCORES_AT_ONCE", rows * model.config.text_config.vocab_size)
    assert texts(generate(model, processor, prompts, Sampling(6, 1.0, 9))) == whole


def test_512_responses_are_the_same_in_chunks_of_any_size(setup, counted):
    """Ids are equal. Log-probs are not bitwise so: a matrix product of another number of rows sums in another order."""
    model, processor, prompts = setup
    prompts = [prompts[i % 3] for i in range(16)]
    sampling, seeds = Sampling(32, 1.0, 8), list(range(16))
    longest = max(len(prompt.input_ids) for prompt in prompts) + 8
    found = []
    for tokens in (1 << 20, 100 * longest, 37 * longest):
        counted.most = 0
        found.append(hf_engine(model, processor, tokens).generate(prompts, sampling, seeds, poll=lambda: None))
        assert 0 < counted.most <= tokens
        assert counted.most > 0.7 * min(tokens, 512 * (longest - 8)), "the budget is used"
    whole = torch.tensor([lp for c in flat(found[0]) for lp in c.logprobs])
    for groups in found[1:]:
        assert texts(groups) == texts(found[0])
        logprobs = torch.tensor([lp for c in flat(groups) for lp in c.logprobs])
        torch.testing.assert_close(logprobs, whole, rtol=0, atol=2e-5)
    assert len(flat(found[0])) == 512


def test_a_response_longer_than_the_budget_is_generated_alone(setup, counted):
    model, processor, prompts = setup
    told: list[str] = []
    groups = hf_engine(model, processor, 1, told).generate(prompts, Sampling(2, 1.0, 5), [1, 2, 3], poll=lambda: None)
    assert texts(groups) == texts(
        hf_engine(model, processor).generate(prompts, Sampling(2, 1.0, 5), [1, 2, 3], poll=lambda: None)
    )
    assert told == []


def test_out_of_memory_halves_the_budget_and_keeps_finished_responses(setup, monkeypatch):
    model, processor, prompts = setup
    sampling, seeds = Sampling(8, 1.0, 6), [1, 2, 3]
    whole = texts(hf_engine(model, processor).generate(prompts, sampling, seeds, poll=lambda: None))
    room, inner, asked = 300, hf.HFRollout._decode, []

    def decode(self, prompts, prompt_of_row, *rest):
        longest = max(len(prompts[p].input_ids) for p in prompt_of_row) + sampling.max_new_tokens
        asked.append(len(prompt_of_row) * longest)
        if asked[-1] > room:
            torch.empty(1 << 62, dtype=torch.uint8)  # what this machine's allocator says
        return inner(self, prompts, prompt_of_row, *rest)

    monkeypatch.setattr(hf.HFRollout, "_decode", decode)
    told: list[str] = []
    engine = hf_engine(model, processor, 1000, told)
    model.train()
    assert texts(engine.generate(prompts, sampling, seeds, poll=lambda: None)) == whole
    assert model.training
    model.eval()
    assert len(told) == 2 and all("out of memory" in text and "tokens per chunk of responses" in text for text in told)
    assert sum(tokens for tokens in asked if tokens <= room) < 1.2 * sum(8 * (len(p.input_ids) + 6) for p in prompts)
    asked.clear()
    engine.generate(prompts, sampling, seeds, poll=lambda: None)
    assert max(asked) <= room and len(told) == 2, "the next step begins with the smaller budget"
    room = 0
    with pytest.raises(StepTooLargeError, match="one item per chunk of responses"):
        engine.generate(prompts, sampling, seeds, poll=lambda: None)


def test_training_mode_is_restored(setup):
    model, processor, prompts = setup
    model.train()
    generate(model, processor, prompts[:1], Sampling(1, 1.0, 2))
    assert model.training
    model.eval()


@pytest.mark.parametrize("end", ["eos_id", "pad_id"])
def test_an_exported_policy_ends_where_stock_generate_ends(setup, tmp_path, end):
    """Its generation_config.json lists two end tokens; each of them ends a response, in greedy decoding."""
    model, processor, prompts = setup
    save_policy(model, processor, tmp_path / "policy")
    listed = json.loads((tmp_path / "policy" / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(listed) == sorted([processor.eos_id, processor.pad_id]) and processor.eos_id != processor.pad_id
    exported, processor = load_policy(tmp_path / "policy"), Processor.from_pretrained(tmp_path / "policy")
    assert processor.tokenizer.decode([processor.pad_id]) == "<|endoftext|>"
    ids = torch.tensor([prompts[2].input_ids])
    free = exported.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :].tolist()
    before = free[3]
    with torch.no_grad():  # wherever the fourth token was likely, the end token is now a little likelier
        exported.lm_head.weight[getattr(processor, end)] = exported.lm_head.weight[before] * 1.01
    wanted = exported.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert getattr(processor, end) == wanted[-1] and len(wanted) < 8
    ((found,),) = generate(exported, processor, [prompts[2]], Sampling(1, 0.0, 8))
    assert list(found.token_ids) == wanted and found.finish_reason == "stop"


@pytest.mark.parametrize("ids", [None, [], 7])
def test_a_policy_that_does_not_end_where_sft_ends_is_refused(setup, ids):
    model, processor, _ = setup
    kept = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = ids
        with pytest.raises(
            ValueError, match=rf"eos_token_id is .*must hold {processor.eos_id}.*generation_config\.json"
        ):
            hf_engine(model, processor)
        model.generation_config.eos_token_id = processor.eos_id
        assert end_ids(model, processor) == (processor.eos_id,)
    finally:
        model.generation_config.eos_token_id = kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1.0, 4), "1 or more"), ((1, -1.0, 4), "positive"), ((2, 0.0, 4), "greedy"), ((1, 1.0, 0), "1 or more")],
)
def test_senseless_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*arguments)
