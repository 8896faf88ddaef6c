"""The embedded engine keeps the contract of rollout engines, and engines that break it are caught."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.rollout.engines import engine_maker
from prism_fast.rollout.hf import HFRollout
from tests.contracts import rollout as contract
from tests.contracts.rollout import CHECKS, Case


@pytest.fixture(scope="module")
def policy_and_processor():
    processor = Processor.build(train_tokenizer(["<caption>\n- digits 1 2 3\n</caption>\n the sum is 4"] * 20, 320))
    return build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=5).double(), processor


def _case(policy_and_processor, make=HFRollout, tokens: int = 1 << 20) -> Case:
    policy, processor = policy_and_processor

    def made():
        return make(policy, processor, TokenBudget(tokens, notify=lambda text: None))

    return Case(policy, processor, made(), made, atol=3e-6)  # the engine samples in float32


@pytest.mark.parametrize("tokens", [1 << 20, 200], ids=["together", "chunks"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_embedded_engine_keeps_the_contract(check, tokens, policy_and_processor):
    check(_case(policy_and_processor, tokens=tokens))


class SeedsByPlace(HFRollout):
    """Random numbers of the batch, not of the prompt."""

    def generate(self, prompts, sampling, seeds, *, poll):
        return super().generate(prompts, sampling, [seed + i for i, seed in enumerate(sorted(seeds))], poll=poll)


class WholeDistribution(HFRollout):
    """Leaves tokens out as it draws, reports log-probs among all of them."""

    def _draw(self, hidden, at, sampling):
        token, _, entropy = super()._draw(hidden, at, sampling)
        scores = self._policy.lm_head(hidden).float()
        scores[:, list(self._processor.banned_ids)] = -torch.inf
        whole = torch.log_softmax(scores / (sampling.temperature or 1.0), dim=-1)
        return token, whole.gather(1, token[:, None]).squeeze(1), entropy


class OneSeedForAll(HFRollout):
    """Every response of a prompt has the first one's random numbers."""

    def _decode(self, prompts, prompt_of_row, keys, sampling, poll):
        first = {}
        keys = [first.setdefault(p, key) for p, key in zip(prompt_of_row, keys, strict=True)]
        return super()._decode(prompts, prompt_of_row, keys, sampling, poll)


class EndsAtTurnsOnly(HFRollout):
    def attach(self, policy, processor):
        super().attach(policy, processor)
        self._ends = (processor.eos_id,)


class DropsTheEnd(HFRollout):
    def generate(self, *arguments, **options):
        def cut(completion):
            if completion.finish_reason == "length":
                return completion
            return replace(completion, token_ids=completion.token_ids[:-1], logprobs=completion.logprobs[:-1])

        return [[cut(c) for c in group] for group in super().generate(*arguments, **options)]


class RawLogprobs(HFRollout):
    """Draws with the temperature, reports without it."""

    def _draw(self, hidden, at, sampling):
        token, _, entropy = super()._draw(hidden, at, sampling)
        scores = self._policy.lm_head(hidden).float()
        scores[:, list(self._processor.banned_ids)] = -torch.inf
        raw = torch.log_softmax(scores, dim=-1).gather(1, token[:, None]).squeeze(1)
        return token, raw, entropy


class BansNothing(HFRollout):
    def attach(self, policy, processor):
        super().attach(policy, copy.copy(processor))
        self._processor.banned_ids = ()


class StaleWeights(HFRollout):
    def attach(self, policy, processor):
        super().attach(copy.deepcopy(policy), processor)


class OtherOrder(HFRollout):
    """The responses of all prompts, number by number."""

    def generate(self, prompts, sampling, seeds, *, poll):
        groups = super().generate(prompts, sampling, seeds, poll=poll)
        mixed = [group[k] for k in range(sampling.n) for group in groups]
        return [mixed[i * sampling.n : (i + 1) * sampling.n] for i in range(len(prompts))]


class IgnoresImages(HFRollout):
    def generate(self, prompts, sampling, seeds, *, poll):
        blank = [p if p.pixel_values is None else replace(p, pixel_values=0 * p.pixel_values) for p in prompts]
        return super().generate(blank, sampling, seeds, poll=poll)


class NeverPolls(HFRollout):
    def generate(self, prompts, sampling, seeds, *, poll):
        return super().generate(prompts, sampling, seeds, poll=lambda: None)


class HandsOverAnotherOrder(HFRollout):
    def generate(self, prompts, sampling, seeds, *, poll, finished=None):
        groups = super().generate(prompts, sampling, seeds, poll=poll)
        for place, group in enumerate(reversed(groups) if finished else ()):
            finished(place, group)
        return groups


class Colder(HFRollout):
    """Draws at four fifths of the temperature, reports at the whole one."""

    def _draw(self, hidden, at, sampling):
        colder = replace(sampling, temperature=0.8 * sampling.temperature)
        token, _, entropy = super()._draw(hidden, at, colder)
        scores = self._policy.lm_head(hidden).float()
        scores[:, list(self._processor.banned_ids)] = -torch.inf
        logprobs = torch.log_softmax(scores / (sampling.temperature or 1.0), dim=-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1), entropy


class LongerByOne(HFRollout):
    def generate(self, prompts, sampling, seeds, *, poll):
        longer = replace(sampling, max_new_tokens=sampling.max_new_tokens + 1)
        return super().generate(prompts, longer, seeds, poll=poll)


class EntropyInBits(HFRollout):
    def generate(self, *arguments, **options):
        groups = super().generate(*arguments, **options)
        return [[replace(c, entropy=c.entropy / math.log(2)) for c in group] for group in groups]


class KeepsItsFirstPolicy(HFRollout):
    def attach(self, policy, processor):
        super().attach(getattr(self, "_policy", policy), processor)


BROKEN = [
    (SeedsByPlace, contract.a_seed_decides_its_responses_whatever_is_generated_with_them),
    (OneSeedForAll, contract.responses_of_a_prompt_and_of_other_seeds_differ),
    (EndsAtTurnsOnly, contract.every_end_token_ends_a_response_and_belongs_to_it),
    (DropsTheEnd, contract.every_end_token_ends_a_response_and_belongs_to_it),
    (RawLogprobs, contract.logprobs_are_those_of_the_sampled_distribution),
    (BansNothing, contract.logprobs_are_those_of_the_sampled_distribution),
    (BansNothing, contract.vision_tokens_are_never_sampled),
    (StaleWeights, contract.new_weights_are_used_once_they_are_synchronised),
    (OtherOrder, contract.logprobs_are_those_of_the_sampled_distribution),
    (IgnoresImages, contract.logprobs_are_those_of_the_sampled_distribution),
    (NeverPolls, contract.poll_is_called_and_may_raise),
    (EntropyInBits, contract.an_entropy_is_the_mean_of_the_sampled_distributions),
    (KeepsItsFirstPolicy, contract.another_policy_is_sampled_once_it_is_attached),
    (HandsOverAnotherOrder, contract.every_group_is_handed_over_once),
    (Colder, contract.tokens_are_drawn_from_the_softmax),
    (WholeDistribution, contract.tokens_beyond_top_k_and_top_p_are_left_out),
    (LongerByOne, contract.max_new_tokens_is_the_longest_response),
]


@pytest.mark.parametrize(("engine", "check"), BROKEN, ids=lambda part: part.__name__)
def test_a_broken_engine_is_caught(engine, check, policy_and_processor):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(_case(policy_and_processor, make=engine))


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"rollout\.engine must be one of hf, vllm, got 'vlm'"):
        engine_maker("vlm")
