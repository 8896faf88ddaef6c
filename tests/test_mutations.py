"""The tests must be able to fail: known errors are written into the formulas, and each must be caught.

A mutation replaces one piece of source text. The changed source is run as a throw-away module whose functions stand in
for the originals wherever the package uses them, and the checks that guard the formula are run against it.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from tests.algorithms import test_advantages, test_dynamic_sampling, test_schedule_numbers
from tests.ops import (
    test_bad_numbers,
    test_group_advantage,
    test_importance_weights,
    test_logprob,
    test_pairwise_loss,
    test_policy_loss,
    test_policy_loss_vectors,
)
from tests.released import test_losses


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutations are written into the executable specification, so that is what the checks must run."""
    monkeypatch.setenv("PRISM_FAST_BACKEND", "reference")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def alignment_vectors() -> None:
    for case in test_advantages.ADVANTAGES:
        test_advantages.test_alignment_vectors(case)


def outcome_vectors() -> None:
    for case in test_advantages.GRPO:
        test_advantages.test_outcome_vectors(case)


def policy_vectors() -> None:
    for case in test_policy_loss_vectors.OFFERED:
        test_policy_loss_vectors.test_policy_loss_vectors(case, "packed")


def aggregation_vectors() -> None:
    for case in test_policy_loss_vectors.VECTORS["agg_loss_cases"]:
        test_policy_loss_vectors.test_aggregation_vectors(case)


def kl_vectors() -> None:
    for case in test_policy_loss_vectors.KL["cases"]:
        test_policy_loss_vectors.test_kl_vectors(case)


def logprob_vectors() -> None:
    for case in test_logprob.VECTORS:
        test_logprob.test_vectors(case)


def logprob_gradients() -> None:
    test_logprob.test_gradcheck(seeded(), None)


def idle_rows() -> None:
    test_logprob.test_rows_without_gradient_add_exactly_nothing("logits", seeded(), None)


def discriminator_vectors() -> None:
    for case in test_losses.VECTORS["mm_gad_cases"]:
        test_losses.test_released_vectors(case)


def equal_scores() -> None:
    test_group_advantage.test_equal_scores_give_exactly_zero("reference", "per_score")


def excluded_rows() -> None:
    test_group_advantage.test_equals_the_loop("reference", "per_score", "exclude", "zero", seeded())


def ties() -> None:
    test_pairwise_loss.test_ties_are_counted_and_claim_no_accuracy()


def spread_term() -> None:
    test_pairwise_loss.test_spread_term_equals_the_sorted_form(seeded())


def log_ratio_clamps() -> None:
    test_policy_loss.test_log_ratio_clamps()


def straight_through_kl() -> None:
    for kl in ("k1", "k3"):
        test_policy_loss.test_straight_through_kl_has_the_value_of_its_form_and_the_gradient_of_k2(kl, seeded())


def inactive_tokens() -> None:
    test_policy_loss.test_inactive_tokens_may_hold_anything("grpo", seeded())


def sapo_formula() -> None:
    test_policy_loss.test_value_equals_the_loop("sapo", "token_mean", seeded())


def cispo_formula() -> None:
    test_policy_loss.test_value_equals_the_loop("cispo", "token_mean", seeded())


def sick_tokens() -> None:
    test_bad_numbers.test_nan_of_an_active_token_is_nan_in_its_gradient("grpo", "logp", "reference", "cpu", seeded())


def corrected_kl() -> None:
    test_policy_loss.test_kl_times_the_ratio("k3", "grpo", "reference", seeded())


def corrected_sequence_kl() -> None:
    test_policy_loss.test_kl_times_the_ratio("k3", "gspo", "reference", seeded())


def bad_offsets() -> None:
    test_bad_numbers.test_bad_offsets_are_nan_everywhere_and_counted("descending", "reference", "cpu", seeded())


def importance_formula() -> None:
    test_importance_weights.test_importance_weights("token_mask", seeded())


def overlong_vectors() -> None:
    test_schedule_numbers.test_overlong_vectors()


def useful_groups() -> None:
    test_dynamic_sampling.test_equal_rewards_are_not_useful_whatever_their_value(0.9, 7, torch.float32)
    test_dynamic_sampling.test_useful_groups_are_those_with_an_advantage(seeded())


def one_round_suffices() -> None:
    test_dynamic_sampling.test_one_round_usually_suffices_and_wastes_little(0.4, 32)


def share_follows() -> None:
    test_dynamic_sampling.test_the_share_follows_a_change()


class Mutation(NamedTuple):
    module: str  # below prism_fast
    text: str  # what stands there, exactly once
    wrong: str  # what is written instead
    check: Callable[[], None]


REFERENCE = "ops.reference."
MUTATIONS = {
    "sign of the policy loss": Mutation(
        REFERENCE + "policy_loss",
        "plain, held = -a * ratio, -a * clipped",
        "plain, held = a * ratio, a * clipped",
        policy_vectors,
    ),
    "clip sides swapped": Mutation(
        REFERENCE + "policy_loss",
        "low, high = 1.0 - options.clips[0], 1.0 + options.clips[1]",
        "low, high = 1.0 - options.clips[1], 1.0 + options.clips[0]",
        policy_vectors,
    ),
    "minimum instead of maximum": Mutation(
        REFERENCE + "policy_loss", "torch.maximum(plain, held)", "torch.minimum(plain, held)", policy_vectors
    ),
    "dual clip on the wrong sign of the advantage": Mutation(
        REFERENCE + "policy_loss",
        "each = torch.where(a < 0, torch.minimum(each, ceiling), each)",
        "each = torch.where(a > 0, torch.minimum(each, ceiling), each)",
        policy_vectors,
    ),
    "token log-ratio clamp": Mutation(
        REFERENCE + "policy_loss", "LOG_RATIO_CLAMP = 20.0", "LOG_RATIO_CLAMP = 25.0", log_ratio_clamps
    ),
    "sequence log-ratio clamp": Mutation(
        REFERENCE + "policy_loss", "SEQUENCE_LOG_RATIO_MAX = 10.0", "SEQUENCE_LOG_RATIO_MAX = 20.0", policy_vectors
    ),
    "GSPO without the length": Mutation(
        REFERENCE + "policy_loss",
        "segment_sum(log_ratio.detach(), sequence, sequences + 1) / on_average",
        "segment_sum(log_ratio.detach(), sequence, sequences + 1)",
        policy_vectors,
    ),
    "CISPO without its clip": Mutation(
        REFERENCE + "policy_loss", "-a * clipped.detach() * new", "-a * ratio.detach() * new", cispo_formula
    ),
    "SAPO temperatures swapped": Mutation(
        REFERENCE + "policy_loss",
        "positive, negative = options.sapo_temperature",
        "negative, positive = options.sapo_temperature",
        sapo_formula,
    ),
    "mask not applied to the inputs": Mutation(
        REFERENCE + "policy_loss",
        "return torch.where(active, value.to(kind), 0.0)",
        "return value.to(kind) * active",
        inactive_tokens,
    ),
    "masked sequences counted": Mutation(
        REFERENCE + "aggregation", "(lengths > 0).sum()", "(lengths >= 0).sum()", policy_vectors
    ),
    "token mean divided by sequences": Mutation(
        REFERENCE + "aggregation",
        "count = lengths.sum() if aggregation == TOKEN_MEAN else",
        "count = lengths.sum() if aggregation != TOKEN_MEAN else",
        aggregation_vectors,
    ),
    "KL value clamp": Mutation(REFERENCE + "kl", "VALUE_CLAMP = 10.0", "VALUE_CLAMP = 20.0", kl_vectors),
    "k2 without its half": Mutation(REFERENCE + "kl", "0.5 * difference.square()", "difference.square()", kl_vectors),
    "straight-through KL with its own gradient": Mutation(
        REFERENCE + "kl",
        "square - square.detach() + kl_estimate(logp, ref_logp, kind[:-1]).detach()",
        "kl_estimate(logp, ref_logp, kind[:-1])",
        straight_through_kl,
    ),
    "straight-through KL with the value of k2": Mutation(
        REFERENCE + "kl",
        "square - square.detach() + kl_estimate(logp, ref_logp, kind[:-1]).detach()",
        "square",
        straight_through_kl,
    ),
    "eps inside the square root": Mutation(
        REFERENCE + "group_advantage",
        "scale = variance.sqrt() + eps",
        "scale = (variance + eps).sqrt()",
        outcome_vectors,
    ),
    "biased standard deviation": Mutation(
        REFERENCE + "group_advantage",
        "groups)[slot] / (size - 1.0).clamp(min=1.0)",
        "groups)[slot] / size.clamp(min=1.0)",
        alignment_vectors,
    ),
    "invalid responses above the minimum": Mutation(
        REFERENCE + "group_advantage",
        "_lowest(x, slot, valid) - 1.0",
        "_lowest(x, slot, valid) + 1.0",
        alignment_vectors,
    ),
    "excluded rows kept in the statistics": Mutation(
        REFERENCE + "group_advantage", "counted = known & valid", "counted = known", excluded_rows
    ),
    "lonely responses": Mutation(
        REFERENCE + "group_advantage", "alone = x / (1.0 + eps)", "alone = torch.zeros_like(x)", alignment_vectors
    ),
    "equal scores by subtraction of the mean": Mutation(
        REFERENCE + "group_advantage",
        "torch.where(keep, x - _lowest(x, slot, counted), 0.0)",
        "torch.where(keep, x, 0.0)",
        equal_scores,
    ),
    "temperature multiplied": Mutation(
        REFERENCE + "softmax_rows", "z.div_(temperature)\n    top =", "z.mul_(temperature)\n    top =", logprob_vectors
    ),
    "temperature missing from the gradient": Mutation(
        REFERENCE + "softmax_rows", "0.0, factor / temperature)", "0.0, factor)", logprob_gradients
    ),
    "entropy gradient without the entropy": Mutation(
        REFERENCE + "softmax_rows", "coefficient.add_(entropy[:, None])", "coefficient", logprob_gradients
    ),
    "idle rows not cleared": Mutation(REFERENCE + "softmax_rows", "    clear_rows_(e, idle)\n", "", idle_rows),
    "ties made by the clamp": Mutation(
        REFERENCE + "pairwise_loss",
        "ties, ahead = best == s, best > s\n",
        "ties, ahead = best.clamp(-10, 10) == s.clamp(-10, 10), best > s\n",
        ties,
    ),
    "clamped pairs lost": Mutation(
        REFERENCE + "pairwise_loss",
        "ties, ahead = best == s, best > s\n",
        "ties, ahead = best == s, best.clamp(-10, 10) > s.clamp(-10, 10)\n",
        ties,
    ),
    "ties won": Mutation(REFERENCE + "pairwise_loss", "best == s, best > s", "best == s, best >= s", ties),
    "a clamp hides what is not a number": Mutation(
        REFERENCE + "policy_loss", "_shown(each.isnan(), sum(learnt), each)", "each", sick_tokens
    ),
    "KL times a ratio without gradient": Mutation(
        REFERENCE + "policy_loss",
        "divergence = divergence * ratio\n",
        "divergence = divergence * ratio.detach()\n",
        corrected_kl,
    ),
    "KL times the clipped estimate's sequence ratio, token by token": Mutation(
        REFERENCE + "policy_loss",
        "drift = segment_sum(log_ratio, sequence, sequences + 1) / on_average\n            divergence",
        "drift = log_ratio - log_ratio.detach() + drift[sequence]\n"
        "            sequence = torch.arange(len(drift))\n            divergence",
        corrected_sequence_kl,
    ),
    "offsets that nobody looks at": Mutation(
        REFERENCE + "segments", "counted(~inside[None])[0]", "counted(~inside[None])[0] & False", bad_offsets
    ),
    "score clamp on one side": Mutation(
        REFERENCE + "pairwise_loss",
        "t.clamp(-clip, clip), s.clamp(-clip, clip)",
        "t.clamp(max=clip), s.clamp(max=clip)",
        discriminator_vectors,
    ),
    "length correction of the wrong sign": Mutation(
        REFERENCE + "pairwise_loss",
        "return score - torch.stack(columns, 1)",
        "return score + torch.stack(columns, 1)",
        discriminator_vectors,
    ),
    "spread quantiles shifted": Mutation(
        REFERENCE + "pairwise_loss", "(rank.to(s.dtype) + 0.5)", "(rank.to(s.dtype) + 0.25)", spread_term
    ),
    "importance ratio inverted": Mutation(
        REFERENCE + "importance_weights",
        "logp.detach().to(kind) - rollout_logp.detach().to(kind)",
        "rollout_logp.detach().to(kind) - logp.detach().to(kind)",
        importance_formula,
    ),
    "weight of the fallback": Mutation("released.losses", "FALLBACK = 0.01", "FALLBACK = 0.1", discriminator_vectors),
    "wrong answers not turned round": Mutation(
        "algorithms.advantages", "(1.0 - 2.0 * wrong)", "(1.0 - 1.0 * wrong)", alignment_vectors
    ),
    "useful by a deviation above an eps": Mutation(
        "algorithms.dynamic_sampling", "return low < high", "return high - low > 1e-6", useful_groups
    ),
    "no reserve of groups": Mutation(
        "algorithms.dynamic_sampling", "CONFIDENCE = 1.0", "CONFIDENCE = 0.0", one_round_suffices
    ),
    "a share that never forgets": Mutation("algorithms.dynamic_sampling", "DECAY = 0.8", "DECAY = 1.0", share_follows),
    "penalty from the limit on": Mutation(
        "algorithms.overlong",
        "to(torch.float32) - (max_length - buffer)",
        "to(torch.float32) - max_length",
        overlong_vectors,
    ),
}


def replace(module_name: str, text: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the mutated source of a module stand in for the original until the end of the test."""
    original = importlib.import_module(module_name)
    source = Path(original.__file__).read_text()
    assert source.count(text) == 1, f"{module_name} holds the text to mutate {source.count(text)} times: {text!r}"
    mutant = types.ModuleType(module_name)
    mutant.__package__ = original.__package__
    mutant.__file__ = original.__file__
    exec(compile(source.replace(text, wrong), f"<mutant of {module_name}>", "exec"), mutant.__dict__)
    stand_in = {id(original): mutant}
    for name, value in vars(original).items():
        if getattr(value, "__module__", None) == module_name:
            stand_in[id(value)] = getattr(mutant, name)
    for user_name, user in list(sys.modules.items()):
        if user is None or user is original or not user_name.startswith(("prism_fast", "tests")):
            continue
        for name, value in list(vars(user).items()):
            if id(value) in stand_in:
                monkeypatch.setattr(user, name, stand_in[id(value)])
            elif isinstance(value, dict) and name.isupper():  # a registry
                for key in [key for key, entry in value.items() if id(entry) in stand_in]:
                    monkeypatch.setitem(value, key, stand_in[id(value[key])])


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, monkeypatch):
    mutation = MUTATIONS[name]
    replace(f"prism_fast.{mutation.module}", mutation.text, mutation.wrong, monkeypatch)
    with pytest.raises((AssertionError, GradcheckError)):
        mutation.check()


@pytest.mark.parametrize("check", sorted({m.check for m in MUTATIONS.values()}, key=lambda c: c.__name__))
def test_checks_accept_the_unchanged_source(check):
    check()


def test_unchanged_stand_in_is_accepted(monkeypatch):
    # A stand-in that changes nothing must pass: what catches the mutations is the mutation, not the machinery.
    for module in sorted({mutation.module for mutation in MUTATIONS.values()}):
        text = next(m.text for m in MUTATIONS.values() if m.module == module)
        replace(f"prism_fast.{module}", text, text, monkeypatch)
    for check in {mutation.check for mutation in MUTATIONS.values()}:
        check()


def test_missing_text_is_an_error(monkeypatch):
    with pytest.raises(AssertionError, match="holds the text to mutate 0 times"):
        replace("prism_fast.ops.reference.kl", "no such text", "", monkeypatch)
