"""Credit per span: from the recipe's key to the gradient of the tokens."""

from __future__ import annotations

import json

import pytest
import torch

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import ConfigError, OptimizerConfig, load_config
from prism_fast.data.grammar import split_tokens
from prism_fast.engine.local import LocalEngine
from prism_fast.engine.protocol import Update
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.protocol import Completion
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch
from tests.support.trainers import update_policy

TEXT = "<caption>\n- digits: 1 2\n</caption>\n<think>1+2=3</think>\n<answer>3</answer>"


def test_sections_end_where_their_closing_tags_end(processor):
    ids = (*processor.encode_text(TEXT), processor.eos_id)
    split = split_tokens(ids, processor.tokenizer)
    assert split.valid and 0 < split.caption_tokens < split.think_tokens < len(ids)
    for count, tag in ((split.caption_tokens, "</caption>"), (split.think_tokens, "</think>")):
        assert tag in processor.decode(ids[:count]) and tag not in processor.decode(ids[: count - 1])


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("loss", ["prism", "dapo", "cispo"])
def test_the_gradient_is_that_of_each_token_with_its_own_advantage(processor, generator, layout, loss):
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=4)
    use_layout(layout, policy)
    prompts = [processor.encode_prompt([{"role": "user", "content": text}], []) for text in ("one", "two words")]
    lengths = [4, 2, 3]
    ids = [tuple(torch.randint(0, 200, (n,), generator=generator).tolist()) for n in lengths]
    completions = [Completion(i, (-5.0,) * len(i), 1.0, "stop") for i in ids]
    advantage = torch.tensor([0.5, -1.0, 0.0])

    def gradient(token_advantage: list[torch.Tensor] | None) -> torch.Tensor:
        engine = LocalEngine(policy, OptimizerConfig())
        engine.step = lambda: Update(0.0, 0.0)
        batch = PolicyBatch(prompts, [0, 0, 1], completions, advantage, token_advantage=token_advantage)
        budget = TokenBudget(10**6, notify=pytest.fail)
        options = policy_options(loss, max_response=9)
        update_policy(engine, batch, options, temperature=1.0, budget=budget, layout=layout, pad_id=processor.pad_id)
        found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        engine.discard()
        return found

    whole = gradient(None)
    torch.testing.assert_close(gradient([a.expand(n) for a, n in zip(advantage, lengths, strict=True)]), whole)
    # Linear in the advantages: the tokens' gradients one by one add up, and a response without any is not computed.
    tokens = [torch.tensor([1.0, 0.0, -2.0, 0.5]), torch.tensor([0.0, 3.0]), torch.zeros(3)]
    single = torch.zeros_like(whole)
    for b, values in enumerate(tokens):
        for t, value in enumerate(values.tolist()):
            alone = [torch.zeros(n) for n in lengths]
            alone[b][t] = value
            if value:
                single += gradient(alone)
    torch.testing.assert_close(gradient(tokens), single, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_a_run_with_credit_per_span(finished, run_again, tmp_path):
    export = finished / "export"
    start = [f"model.policy={export / 'sft'}", f"model.discriminator={export / 'discriminator-warmup'}"]
    start += ["stages=[align]", "data.eval=null"]
    found = {}
    for answer in ("mean", "verifier"):
        folder = run_again(tmp_path / answer, *start, "align.credit=span", f"align.answer_credit={answer}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[answer] = [line for line in lines if line["stage"] == "align"]
        assert all(f"advantage/{name}_abs" in found[answer][0] for name in ("caption", "think", "answer"))
    first, other = found["mean"][0], found["verifier"][0]
    assert first["advantage/caption_abs"] == other["advantage/caption_abs"] > 0
    assert first["advantage/answer_abs"] != other["advantage/answer_abs"]
    assert first["policy/grad_norm"] != other["policy/grad_norm"]
    plain = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith("advantage/caption") for line in plain for key in line), "off by default"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["align.credit=span", "align.discriminate=response"], "align.discriminate"),
        (["align.credit=span", "align.advantage=acc_gating"], "align.advantage"),
        (["align.credit=span", "align.loss=gspo"], "align.loss"),
        (["align.credit=span", "semantics=released"], "align.credit"),
        (["align.credit=span", "semantics=paper"], "align.credit"),
        (["align.answer_credit=verifier"], "align.answer_credit"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(overrides, key):
    with pytest.raises(ConfigError, match=key):
        load_config("digits", overrides)
