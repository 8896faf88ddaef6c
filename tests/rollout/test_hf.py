"""The embedded rollout engine: exact ids, exact log-probs, nothing forbidden, same seed same ids."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Sampling


@pytest.fixture(scope="module")
def setup():
    tokenizer = train_tokenizer(["<caption>\n- digits 1 2 3\n</caption>\n the sum is 4"] * 20, 320)
    processor = Processor.build(tokenizer)
    model = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=5).double()
    noise = Image.effect_noise((128, 32), 50).convert("RGB")
    tall = Image.effect_noise((32, 96), 50).convert("RGB")
    image = {"type": "image"}

    def prompt(text: str, *images: Image.Image):
        content = [image] * len(images) + [{"type": "text", "text": text}]
        return processor.encode_prompt([{"role": "user", "content": content}], images)

    prompts = [prompt("digits", noise), prompt("the sum of the digits is", tall, noise), prompt("no image at all")]
    return model, processor, prompts


def _flat(groups):
    return [completion for group in groups for completion in group]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward(setup, temperature):
    model, processor, prompts = setup
    sampling = Sampling(n=5, temperature=temperature, max_new_tokens=23)
    completions = _flat(HFRollout(model, processor).generate(prompts, sampling, seed=1))
    rows = [p for p in range(len(prompts)) for _ in range(5)]
    batch = collate(
        prompts, rows, [c.token_ids for c in completions], model_config=model.config, pad_id=processor.pad_id
    )
    where = response_rows(batch)
    logits = model.lm_head(hidden_states(model.model, batch).flatten(0, 1)[where.index])
    logits[:, list(processor.banned_ids)] = -torch.inf
    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    expected = log_softmax.gather(1, where.target[:, None]).squeeze(1)
    sampled = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float64)
    torch.testing.assert_close(sampled, expected.detach(), rtol=0, atol=2e-6)  # the engine samples in float32
    probs = log_softmax.exp()
    entropy = -torch.special.xlogy(probs, probs).sum(-1).detach()
    lengths = [len(c.token_ids) for c in completions]
    means = torch.stack([part.mean() for part in entropy.split(lengths)])
    torch.testing.assert_close(torch.tensor([c.entropy for c in completions]).double(), means, rtol=0, atol=5e-6)


def test_rows_that_end_leave_the_batch_and_change_nothing(setup):
    model, processor, prompts = setup
    biased = model.lm_head.weight.data[processor.eos_id].clone()
    direction = torch.randn(biased.shape, generator=torch.Generator().manual_seed(0))
    try:
        model.lm_head.weight.data[processor.eos_id] = biased + 0.4 * direction  # endings at many lengths
        completions = _flat(HFRollout(model, processor).generate(prompts, Sampling(16, 1.0, 40), seed=2))
    finally:
        model.lm_head.weight.data[processor.eos_id] = biased
    lengths = {len(c.token_ids) for c in completions}
    assert len(lengths) > 3, "the case must have ragged endings to test compaction"
    for completion in completions:
        assert len(completion.logprobs) == len(completion.token_ids)
        ended = completion.token_ids[-1] == processor.eos_id
        assert completion.finish == ("stop" if ended else "length")
        assert processor.eos_id not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 40


def test_vision_tokens_are_never_sampled(setup):
    model, processor, prompts = setup
    weight = model.lm_head.weight.data
    kept = weight.clone()
    try:
        weight[list(processor.banned_ids)] = 50 * weight.mean(dim=0)  # a policy that would love to sample them
        weight[list(processor.banned_ids)[::2]] *= -1
        for temperature, n in ((1.0, 8), (0.0, 1)):
            for completion in _flat(
                HFRollout(model, processor).generate(prompts, Sampling(n, temperature, 12), seed=3)
            ):
                assert not set(completion.token_ids) & set(processor.banned_ids)
    finally:
        weight.copy_(kept)


def test_same_seed_same_ids_other_seed_others(setup):
    model, processor, prompts = setup
    engine, sampling = HFRollout(model, processor), Sampling(4, 1.0, 16)
    first = engine.generate(prompts, sampling, seed=7)
    torch.rand(3)  # the global random state plays no part
    assert engine.generate(prompts, sampling, seed=7) == first
    assert engine.generate(prompts, sampling, seed=8) != first


def test_greedy_takes_the_most_likely_token_and_reports_progress(setup):
    model, processor, prompts = setup
    growing: list[int] = []
    engine = HFRollout(model, processor)
    groups = engine.generate(prompts[:1], Sampling(1, 0.0, 4), seed=0, on_token=growing.append)
    (completion,) = groups[0]
    assert len(growing) == len(completion.token_ids)
    batch = collate(prompts[:1], [0], [completion.token_ids], model_config=model.config, pad_id=processor.pad_id)
    where = response_rows(batch)
    logits = model.lm_head(hidden_states(model.model, batch).flatten(0, 1)[where.index])
    logits[:, list(processor.banned_ids)] = -torch.inf
    assert logits.argmax(-1).tolist() == list(completion.token_ids)


def test_training_mode_is_restored_and_no_prompts_give_nothing(setup):
    model, processor, prompts = setup
    model.train()
    HFRollout(model, processor).generate(prompts[:1], Sampling(1, 1.0, 2), seed=0)
    assert model.training
    model.eval()
    assert HFRollout(model, processor).generate([], Sampling(1, 1.0, 2), seed=0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1.0, 4), "1 or more"), ((1, -1.0, 4), "positive"), ((2, 0.0, 4), "greedy"), ((1, 1.0, 0), "1 or more")],
)
def test_senseless_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*arguments)
