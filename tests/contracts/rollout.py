"""The contract of rollout engines, as checks that any engine must pass.

A test module makes a `Case` per engine and calls every one of `CHECKS` with it; a check raises AssertionError where the
engine breaks its word. The engine under test serves all checks, as it serves a whole run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor, nn

from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.processor import Processor, Prompt
from prism_fast.rollout.protocol import Completion, Rollout, Sampling, end_ids

SEEDS = (11, 2**63 + 5, 0)


@dataclass
class Case:
    """``engine`` is attached to ``policy``, whose own forward is the truth within ``atol`` (nats)."""

    policy: nn.Module
    processor: Processor
    engine: Rollout
    make: Callable[[], Rollout]  # another one like it
    atol: float

    def __post_init__(self) -> None:
        def prompt(text: str, *sizes: tuple[int, int]) -> Prompt:
            rng = np.random.default_rng(len(text))
            images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            return self.processor.encode_prompt([{"role": "user", "content": content}], images)

        self.prompts = [
            prompt("no image at all"),
            prompt("digits", (128, 32)),
            prompt("the sum of the digits is", (32, 96), (96, 32)),
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]):
        return self.engine.generate(prompts, sampling, seeds, poll=lambda: None)

    def push(self) -> None:
        self.engine.sync((name, tensor.detach()) for name, tensor in self.policy.named_parameters())  # a tied one once

    @contextmanager
    def changed(self, change: Callable[[nn.Module], None]) -> Iterator[None]:
        """The policy with other weights, pushed; afterwards the old ones, pushed again."""
        kept = {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}
        try:
            with torch.no_grad():
                change(self.policy)
            self.push()
            yield
        finally:
            self.policy.load_state_dict(kept)
            self.push()

    @torch.no_grad()
    def scores(self, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """[tokens, V] float64 scores of the policy's forward over a whole response, banned ids at -inf."""
        batch = collate([prompt], [0], [ids], model_config=self.policy.config, pad_id=self.processor.pad_id).to(
            self.policy.device
        )
        hidden = hidden_states(self.policy.model, batch).flatten(0, 1)[response_rows(batch).index]
        scores = self.policy.lm_head(hidden).double()
        scores[:, list(self.processor.banned_ids)] = -torch.inf
        return scores.cpu()

    def assert_logprobs(self, groups: Sequence[Sequence[Completion]], temperature: float) -> None:
        for prompt, group in zip(self.prompts, groups, strict=True):
            for completion in group:
                scores = self.scores(prompt, completion.token_ids) / temperature
                own = torch.tensor(completion.token_ids)[:, None]
                expected = scores.log_softmax(-1).gather(1, own).squeeze(1)
                found = torch.tensor(completion.logprobs, dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=0, atol=self.atol)

    def raised(self, ids: Sequence[int], amount: float) -> Callable[[nn.Module], None]:
        """A change that adds ``amount`` to the scores of ``ids`` wherever the policy's last state is as it is behind
        the prompts, roughly."""

        def change(policy: nn.Module) -> None:
            batch = collate(
                self.prompts, range(3), [()] * 3, model_config=policy.config, pad_id=self.processor.pad_id
            ).to(policy.device)
            hidden = hidden_states(policy.model, batch)
            state = hidden[torch.arange(3, device=policy.device), batch.lengths - 1].mean(dim=0)
            policy.lm_head.weight[list(ids)] += amount * state / state.square().sum()

        return change


def texts(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def logprobs_are_those_of_the_sampled_distribution(case: Case) -> None:
    """Of exactly these prompts (no, one and two images), in their order, with ban and temperature."""
    with case.changed(case.raised(case.processor.banned_ids, 2.0)):  # so that a forgotten ban shows
        for temperature in (1.0, 0.7, 1.9):
            groups = case.generate(case.prompts, Sampling(4, temperature, 11), SEEDS)
            assert [len(group) for group in groups] == [4, 4, 4]
            case.assert_logprobs(groups, temperature)


def tokens_beyond_top_k_and_top_p_are_left_out(case: Case) -> None:
    """Log-probs are those among the tokens that stay, found here by a loop over sorted probabilities; rows where
    rounding decides about the last one are left out."""
    for top_k, top_p in ((3, 1.0), (0, 0.6), (20, 0.8)):
        sampling = Sampling(6, 1.3, 9, top_k=top_k, top_p=top_p)
        drawn = 0
        for prompt, group in zip(case.prompts, case.generate(case.prompts, sampling, SEEDS), strict=True):
            for completion in group:
                scores = case.scores(prompt, completion.token_ids) / 1.3
                for row, token, found in zip(scores, completion.token_ids, completion.logprobs, strict=True):
                    likeliest = row.softmax(-1).sort(descending=True)
                    shares = likeliest.values[: top_k or None]
                    shares, kept, mass = shares / shares.sum(), 0, 0.0
                    while mass < top_p - 1e-5 and kept < len(shares):
                        mass, kept = mass + float(shares[kept]), kept + 1
                    place = likeliest.indices.tolist().index(token)
                    if top_p < 1 and min(abs(mass - float(shares[kept - 1]) - top_p), abs(mass - top_p)) < 1e-3:
                        continue
                    assert place < kept
                    assert abs(found - float(shares[place].log() - np.log(mass))) <= case.atol
                    drawn += 1
        assert drawn > 50


def an_entropy_is_the_mean_of_the_sampled_distributions(case: Case) -> None:
    """Where the engine sees whole distributions."""
    with case.changed(case.raised(case.processor.banned_ids, 2.0)):
        for sampling in (Sampling(3, 0.6, 11), Sampling(1, 0.0, 11)):
            for prompt, group in zip(case.prompts, case.generate(case.prompts, sampling, SEEDS), strict=True):
                for completion in group:
                    probs = (case.scores(prompt, completion.token_ids) / (sampling.temperature or 1.0)).softmax(-1)
                    mean = float(-torch.special.xlogy(probs, probs).sum(-1).mean())
                    assert completion.entropy is None or abs(completion.entropy - mean) <= 2 * case.atol


def another_policy_is_sampled_once_it_is_attached(case: Case) -> None:
    sampling, other = Sampling(2, 1.0, 8), copy.deepcopy(case.policy)
    before = case.generate(case.prompts, sampling, SEEDS)
    with torch.no_grad():
        other.lm_head.weight += 0.3 * other.lm_head.weight.std() * torch.randn_like(other.lm_head.weight)
    case.engine.attach(other, case.processor)
    try:
        after = case.generate(case.prompts, sampling, SEEDS)
        replace(case, policy=other).assert_logprobs(after, 1.0)
    finally:
        case.engine.attach(case.policy, case.processor)
    assert flat(after)[-1].logprobs != flat(before)[-1].logprobs, "the other policy must differ for the case"
    assert texts(case.generate(case.prompts, sampling, SEEDS)) == texts(before)


def a_seed_decides_its_responses_whatever_is_generated_with_them(case: Case) -> None:
    sampling = Sampling(4, 1.0, 12)
    first = texts(case.generate(case.prompts, sampling, SEEDS))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert texts(case.generate(case.prompts, sampling, SEEDS)) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator plays no part"
    assert texts(case.generate(case.prompts[::-1], sampling, SEEDS[::-1])) == first[::-1]
    for k in range(3):
        assert texts(case.generate([case.prompts[k]], sampling, [SEEDS[k]])) == [first[k]]
    fewer = texts(case.generate(case.prompts, Sampling(2, 1.0, 12), SEEDS))
    assert fewer == [group[:2] for group in first]
    shorter = texts(case.generate(case.prompts, Sampling(4, 1.0, 5), SEEDS))
    assert shorter == [[ids[:5] for ids in group] for group in first]


def responses_of_a_prompt_and_of_other_seeds_differ(case: Case) -> None:
    sampling = Sampling(6, 1.0, 12)
    one, same, other = texts(case.generate([case.prompts[1]] * 3, sampling, [5, 5, 6]))
    assert one == same and len(set(one)) == 6 and not set(one) & set(other)


def every_end_token_ends_a_response_and_belongs_to_it(case: Case) -> None:
    ends, seen = set(end_ids(case.policy, case.processor)), set()
    assert ends == {case.processor.eos_id, case.processor.pad_id}
    with case.changed(case.raised(sorted(ends), 5.0)):
        for completion in flat(case.generate(case.prompts, Sampling(12, 1.0, 24), SEEDS)):
            *body, last = completion.token_ids
            assert len(completion.logprobs) == len(completion.token_ids)
            assert not ends & set(body)
            assert completion.finish_reason == ("stop" if last in ends else "length")
            assert last in ends or len(completion.token_ids) == 24
            seen |= {last} & ends
    assert seen == ends, "the case must end responses in both ways"


def vision_tokens_are_never_sampled(case: Case) -> None:
    banned = set(case.processor.banned_ids)
    with case.changed(case.raised(sorted(banned), 12.0)):
        for sampling in (Sampling(8, 1.0, 8), Sampling(1, 0.0, 8)):
            for completion in flat(case.generate(case.prompts, sampling, SEEDS)):
                assert not banned & set(completion.token_ids)


def greedy_takes_the_most_likely_token(case: Case) -> None:
    groups = case.generate(case.prompts, Sampling(1, 0.0, 9), SEEDS)
    for prompt, (completion,) in zip(case.prompts, groups, strict=True):
        best = case.scores(prompt, completion.token_ids).argmax(dim=-1).tolist()
        assert best == list(completion.token_ids)
    case.assert_logprobs(groups, 1.0)


def tokens_are_drawn_from_the_softmax(case: Case) -> None:
    """The first token of many responses, in 16 classes of about equal probability."""
    for temperature in (0.6, 1.0, 1.9):
        probs = (case.scores(case.prompts[0], [0])[0] / temperature).softmax(-1)
        order = probs.argsort(descending=True)
        share = probs[order].cumsum(0)
        class_of = torch.empty_like(order)
        class_of[order] = ((share - probs[order] / 2) * 16).long().clamp(max=15)
        expected = torch.zeros(16, dtype=torch.float64).index_add(0, class_of, probs)
        drawn = [c.token_ids[0] for c in case.generate([case.prompts[0]], Sampling(1024, temperature, 1), [3])[0]]
        found = torch.bincount(class_of[torch.tensor(drawn)], minlength=16)
        kept = expected > 0
        assert found[~kept].sum() == 0
        p = chisquare(found[kept].numpy(), (expected[kept] / expected.sum() * len(drawn)).numpy()).pvalue
        assert p > 1e-4, f"temperature {temperature}: p={p}"


def max_new_tokens_is_the_longest_response(case: Case) -> None:
    for limit in (1, 7):
        completions = flat(case.generate(case.prompts, Sampling(3, 1.0, limit), SEEDS))
        assert max(len(c.token_ids) for c in completions) == limit
        for c in completions:
            assert c.finish_reason == "stop" or len(c.token_ids) == limit


def poll_is_called_and_may_raise(case: Case) -> None:
    class Stop(Exception):
        pass

    sampling, calls = Sampling(3, 1.0, 10), []
    whole = case.engine.generate(case.prompts, sampling, SEEDS, poll=lambda: calls.append(None))
    assert len(calls) >= max(len(c.token_ids) for c in flat(whole))
    for last in (0, 3):
        calls.clear()

        def poll(last=last) -> None:
            calls.append(None)
            if len(calls) > last:
                raise Stop

        with pytest.raises(Stop):
            case.engine.generate(case.prompts, sampling, SEEDS, poll=poll)
        assert texts(case.generate(case.prompts, sampling, SEEDS)) == texts(whole), "as if nothing had happened"


def new_weights_are_used_once_they_are_synchronised(case: Case) -> None:
    """One kind of weight at a time: embeddings (tied to the output matrix), the language model, the vision tower."""
    kinds = (
        "embed_tokens.weight",
        "language_model.layers.1.self_attn.q_proj.weight",
        "visual.blocks.0.attn.qkv.weight",
    )
    sampling = Sampling(2, 1.0, 8)
    before = case.generate(case.prompts, sampling, SEEDS)
    for kind in kinds:
        (name,) = [n for n, _ in case.policy.named_parameters() if n.endswith(kind)]

        def change(policy: nn.Module, name=name) -> None:
            weight = policy.get_parameter(name)
            weight += (
                0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).to(weight)
            )

        with case.changed(change):
            after = case.generate(case.prompts, sampling, SEEDS)
            case.assert_logprobs(after, 1.0)
        assert flat(after)[-1].logprobs != flat(before)[-1].logprobs, f"{name} must matter for the case"
    assert texts(case.generate(case.prompts, sampling, SEEDS)) == texts(before)


def nothing_is_lost_by_sleeping(case: Case) -> None:
    sampling = Sampling(2, 1.0, 6)
    before = texts(case.generate(case.prompts, sampling, SEEDS))
    case.engine.sleep()
    case.engine.wake()
    case.push()
    assert texts(case.generate(case.prompts, sampling, SEEDS)) == before


def every_group_is_handed_over_once(case: Case) -> None:
    handed = []
    groups = case.engine.generate(
        case.prompts,
        Sampling(2, 1.0, 6),
        SEEDS,
        poll=lambda: None,
        finished=lambda place, group: handed.append((place, list(group))),
    )
    assert sorted(handed, key=lambda item: item[0]) == list(enumerate(groups))


def wrong_calls_are_refused(case: Case) -> None:
    assert case.generate([], Sampling(2, 1.0, 4), []) == []
    with pytest.raises(ValueError, match="seed"):
        case.generate(case.prompts, Sampling(2, 1.0, 4), SEEDS[:2])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            case.generate(case.prompts[:1], Sampling(2, 1.0, 4), [seed])


def a_closed_engine_says_so(case: Case) -> None:
    engine = case.make()
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.generate(case.prompts, Sampling(1, 1.0, 2), SEEDS, poll=lambda: None)


def damaged_weights_are_told(case: Case) -> None:
    def spoil(policy: nn.Module) -> None:
        policy.lm_head.weight[3] = torch.nan

    with case.changed(spoil), pytest.raises(FloatingPointError, match="not finite"):
        case.generate(case.prompts, Sampling(2, 1.0, 4), SEEDS)
    case.generate(case.prompts, Sampling(2, 1.0, 4), SEEDS)


CHECKS = (
    logprobs_are_those_of_the_sampled_distribution,
    tokens_beyond_top_k_and_top_p_are_left_out,
    an_entropy_is_the_mean_of_the_sampled_distributions,
    a_seed_decides_its_responses_whatever_is_generated_with_them,
    responses_of_a_prompt_and_of_other_seeds_differ,
    every_end_token_ends_a_response_and_belongs_to_it,
    vision_tokens_are_never_sampled,
    greedy_takes_the_most_likely_token,
    tokens_are_drawn_from_the_softmax,
    max_new_tokens_is_the_longest_response,
    poll_is_called_and_may_raise,
    new_weights_are_used_once_they_are_synchronised,
    another_policy_is_sampled_once_it_is_attached,
    nothing_is_lost_by_sleeping,
    every_group_is_handed_over_once,
    wrong_calls_are_refused,
    a_closed_engine_says_so,
    damaged_weights_are_told,
)
