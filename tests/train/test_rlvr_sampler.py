"""Dynamic sampling without a model: only missing groups are generated, surplus ones are kept and go first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prism_fast.config import ConfigError, RlvrConfig, load_config
from prism_fast.data.order import SampleOrder
from prism_fast.engine.world import World
from prism_fast.rewards import Reward
from prism_fast.rollout.protocol import Completion
from prism_fast.train.grading import Grader
from prism_fast.train.group_sampler import GroupSampler, NoUsefulGroupError, training_reward
from prism_fast.train.rollout_record import Origin, RolloutGroup
from prism_fast.train.rollouts import StepRollouts
from tests.support.played_world import on_ranks

N = 3
GRADED = Grader(None)  # groups have their rewards: nothing is checked


def _group(index: int, scores: list[float], origin: Origin) -> RolloutGroup:
    completions = [Completion((index, 7), (-0.25, -1.5), 0.5, "stop")] * len(scores)
    splits = [SimpleNamespace(valid=True)] * len(scores)
    rewards = [Reward(score, float(score > 0.5), 1.0, "number") for score in scores]
    prompt = SimpleNamespace(input_ids=(1, 2, index))
    return RolloutGroup(index, SimpleNamespace(uid=str(index)), prompt, completions, splits, origin, rewards)


class Source:
    """Gives groups by a plan: for each call, which of its groups have unequal rewards."""

    stage = "rlvr"

    def __init__(self, *plans: str):
        self.plans, self.calls, self.restored = list(plans), [], []

    def take(self, indices, *, step, round=0):
        plan = self.plans.pop(0) if self.plans else ""
        self.calls.append((step, round, list(indices)))
        groups = []
        for place, index in enumerate(indices):
            useful = place < len(plan) and plan[place] == "u"
            groups.append(_group(index, [0.9, 0.2, 0.9] if useful else [0.9] * N, Origin(step, round, place)))
        return StepRollouts(groups, {"time/generate": 1.0})

    def restore(self, records):
        origin = Origin(**records[0]["sampled"])
        return _group(records[0]["index"], [r["reward"]["score"] for r in records], origin)


def _sampler(source: Source, prompts: int = 4, **dynamic) -> GroupSampler:
    settings = "".join(f"{key}: {value}, " for key, value in dynamic.items())
    overrides = [
        f"rlvr.prompts={prompts}",
        f"rlvr.rollout.n={N}",
        f"rlvr.dynamic_sampling={{enabled: true, {settings}}}",
    ]
    return GroupSampler(source, GRADED, SampleOrder(100, seed=4), load_config("digits", overrides).rlvr)


def _indices(rollouts: StepRollouts) -> list[int]:
    return [group.index for group in rollouts.groups]


def test_rewards_without_a_score_make_no_group_useful():
    source = Source("uu")
    take = source.take

    def unscored(indices, **where):
        """Without its first reward the first group keeps 0.2 and 0.9; without its second the other has 0.9 twice."""
        rollouts = take(indices, **where)
        for group, lost in zip(rollouts.groups, (0, 1), strict=False):
            group.rewards[lost] = Reward(None, 0.0, 1.0, "not_scored")
        return rollouts

    source.take = unscored
    sampler = _sampler(source, prompts=1)
    sampled = sampler.take(1)
    assert len(sampled.generated.groups) >= 2 and sampled.generated.reward_metrics().read()["reward/unscored"] == 2
    assert sampled.trained.scored.tolist() == [False, True, True] and sampler.surplus == []


def test_without_dynamic_sampling_a_step_is_one_round():
    source = Source("uu")
    sampled = GroupSampler(source, GRADED, SampleOrder(9, seed=1), RlvrConfig(prompts=5)).take(1)
    assert len(source.calls) == 1 and len(sampled.trained.groups) == 5
    assert sampled.unused == [] and sampled.metrics.read() == {}


def test_only_missing_groups_are_generated_and_never_the_same_prompt_twice():
    source = Source("u.......", "..u.............", "uu.............")
    sampled = _sampler(source).take(1)
    counts = [len(indices) for _, _, indices in source.calls]
    assert sampled.metrics.read()["sampling/rounds"] == len(counts) == 3
    asked = [index for _, _, indices in source.calls for index in indices]
    assert len(set(asked)) == len(asked) == sampled.metrics.read()["sampling/generated"]
    first, second, third = (indices for _, _, indices in source.calls)
    assert _indices(sampled.trained) == [first[0], second[2], *third[:2]]
    assert sampled.metrics.read()["sampling/useful_share"] == 4 / len(asked)
    assert sampled.metrics.read()["sampling/missing"] == sampled.metrics.read()["sampling/banked"] == 0
    assert len(sampled.unused) == len(asked) - 4
    assert sampled.generated.time == {"time/generate": 3.0}


def test_after_a_lucky_streak_fewer_are_generated_than_after_a_bad_one():
    lucky, bad = _sampler(Source(*["u" * 20] * 12)), _sampler(Source(*["u" + "." * 20] * 99), max_rounds=100)
    for step in range(1, 6):
        lucky.take(step), bad.take(step)
    assert lucky.share.to_generate(4) < 7 < bad.share.to_generate(4)


def test_a_round_is_never_larger_than_the_bound():
    source = Source(*["............"] * 8, "uuuu")
    _sampler(source, max_oversampling=2.5).take(1)
    assert max(len(indices) for _, _, indices in source.calls) == 10


def test_surplus_is_kept_and_goes_first_oldest_before_newer():
    source = Source("uuuuuuu", "uuuuuuuuu")
    sampler = _sampler(source)
    first = sampler.take(1)
    surplus = [source.calls[0][2][place] for place in (4, 5, 6)]
    assert first.metrics.read()["sampling/banked"] == 3 and [kept.group.index for kept in sampler.surplus] == surplus
    assert {g.index for g in first.unused} >= set(surplus), "a replay of this step needs the kept ones too"
    second = sampler.take(2)
    assert _indices(second.trained)[:3] == surplus
    assert len(source.calls[1][2]) < 9, "one is missing, not four"
    assert second.metrics.read()["sampling/age_max"] == 1 and second.metrics.read()["sampling/age_mean"] == 0.75
    assert second.trained.groups[3].origin.step == 2


def test_a_step_that_the_kept_groups_fill_generates_nothing():
    source = Source("u" * 12)
    sampler = _sampler(source, prompts=3)
    sampler.share.observe(1000, 100)  # expects few, so it asks for as many as it may, and finds plenty
    sampler.take(1)
    assert len(sampler.surplus) == 6
    second = sampler.take(2)
    assert len(source.calls) == 1 and second.generated.groups == [] and second.unused == []
    assert second.metrics.read()["sampling/rounds"] == 0 and "sampling/useful_share" not in second.metrics.read()
    assert sampler.take(3).metrics.read()["sampling/age_max"] == 2, "none waits longer than max_oversampling steps"


def published_step(plans: list[str], wanted: int) -> list[tuple[int, int]]:
    """(round, place) of the groups of a published step: whole rounds until there are enough, the first of them, what is
    left over dropped; behind ten rounds an error."""
    found: list[tuple[int, int]] = []
    for round, plan in enumerate(plans):
        found += [(round, place) for place, useful in enumerate(plan) if useful == "u"]
        if len(found) >= wanted:
            return found[:wanted]
        if round + 1 == 10:
            raise ValueError("generated too many batches")
    raise AssertionError("more plans are needed")


def test_the_published_surplus_is_lost_ours_is_the_next_steps():
    plans = ["uuuuuuu", "uuuuuuuuu"]
    assert [published_step(plans[step:], 4) for step in (0, 1)] == [[(0, place) for place in range(4)]] * 2
    source = Source(*plans)
    sampler = _sampler(source)
    trained = _indices(sampler.take(1).trained) + _indices(sampler.take(2).trained)
    assert trained == [*source.calls[0][2][:7], source.calls[1][2][0]], "nothing useful was generated for nothing"


def test_the_published_bound_ends_the_run_ours_trains_on_what_was_found():
    plans = ["u"] + ["."] * 9
    with pytest.raises(ValueError, match="too many batches"):
        published_step(plans, 4)
    source = Source(*plans)
    sampled = _sampler(source).take(1)
    assert len(source.calls) == 10 and sampled.metrics.read()["sampling/rounds"] == 10
    assert len(sampled.trained.groups) == 1 and sampled.metrics.read()["sampling/missing"] == 3


def test_no_useful_group_at_all_is_an_error_that_says_so():
    with pytest.raises(NoUsefulGroupError, match=r"step 3: in none of the \d+ groups generated in 2 rounds"):
        _sampler(Source(), max_rounds=2).take(3)


def test_the_state_goes_on_exactly_with_the_kept_groups():
    plans = ["uuuuuu", "u.u.uuu", "uu", "uuuu"]
    straight, first = _sampler(Source(*plans)), _sampler(Source(*plans))
    straight.take(1), first.take(1)
    second = _sampler(Source(*plans[1:]))
    second.order.load_state_dict(first.order.state_dict())
    second.load_state_dict(first.state_dict())
    assert len(second.surplus) == 2
    for step in (2, 3):
        ours, theirs = second.take(step), straight.take(step)
        assert _indices(ours.trained) == _indices(theirs.trained) and ours.metrics.read() == theirs.metrics.read()


class Shared(Source):
    """One rank's source: its share of every round."""

    world = World()

    def take(self, indices, *, step, round=0):
        rollouts = super().take(indices, step=step, round=round)
        return StepRollouts(self.world.share(rollouts.groups), rollouts.time)


def _on_ranks(ranks: int, plans: list[str], steps: int, prompts: int) -> tuple[list[list], list[dict], list[dict]]:
    """Of every step each rank's trained groups, the metrics of all, and the ranks' states at the end."""

    def learn(world: World):
        source = Shared(*plans)
        source.world = world
        sampler = _sampler(source, prompts=prompts, max_oversampling=2.0)
        sampler.world = world
        sampler.share.observe(1000, 100)  # expects few: every round has the largest size, which both can share
        taken = [sampler.take(step) for step in range(1, steps + 1)]
        trained = [[group.origin for group in sampled.trained.groups] for sampled in taken]
        unused = [[group.origin for group in sampled.unused] for sampled in taken]
        assert all(not set(mine) & sampled.origins for mine, sampled in zip(unused, taken, strict=True))
        assert all(sampled.per_rank <= len(mine) for mine, sampled in zip(trained, taken, strict=True))
        return trained, [sampled.metrics.read(world.gather) for sampled in taken], sampler.state_dict()

    trained, metrics, states = zip(*on_ranks(ranks, learn), strict=True)
    return [sum(mine, []) for mine in zip(*trained, strict=True)], list(metrics), list(states)  # noqa: RUF017


def test_ranks_share_a_step_as_one_process_has_it():
    """Useful groups lie on one rank's part of a round; both train on as many, and keep the same surplus."""
    plans = ["uuu...uu", "uuuuu...", "u....uuu", "uuuuuuuu"]
    one, metrics, states = _on_ranks(1, plans, 3, 4)
    two, of_ranks, both = _on_ranks(2, plans, 3, 4)
    assert two == one and len(one[0]) == 4
    assert of_ranks[0] == of_ranks[1] == metrics[0]
    assert both[0] == both[1] == states[0] and states[0]["kept"]


def test_a_rank_without_a_useful_group_is_an_error():
    with pytest.raises(NoUsefulGroupError, match=r"in only 1 of the \d+ groups .* each of 2 ranks needs one"):
        _on_ranks(2, ["u"], 1, 2)


def test_overlong_shaping_makes_groups_of_equal_answers_differ():
    config = load_config(
        "digits", ["rlvr.rollout.max_new_tokens=10", "rlvr.overlong_buffer=4", "rlvr.overlong_factor=2"]
    ).rlvr
    group = _group(0, [0.9, 0.9, 0.9], Origin(1, 0, 0))
    lengths = [6, 8, 10]
    completions = [Completion((1,) * k, (0.0,) * k, 0.0, "stop") for k in lengths]
    rollouts = StepRollouts([RolloutGroup(**{**vars(group), "completions": completions})])
    assert training_reward(rollouts, config).tolist() == pytest.approx([0.9, 0.9 - 1.0, 0.9 - 2.0])
    assert training_reward(rollouts, RlvrConfig()).tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rlvr.dynamic_sampling.enabled=true", "rlvr.rollout.n=1"], "rlvr.rollout.n"),
        (["rlvr.dynamic_sampling.max_rounds=0"], "max_rounds"),
        (["rlvr.dynamic_sampling.max_oversampling=0.5"], "max_oversampling"),
        (["rlvr.overlong_buffer=97"], "rlvr.overlong_buffer"),
        (["rlvr.overlong_factor=-1"], "rlvr.overlong_factor"),
        (["rlvr.updates_per_step=17"], "rlvr.updates_per_step"),
        (["rlvr.updates_per_step=0"], "rlvr.updates_per_step"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(overrides, key):
    with pytest.raises(ConfigError, match=key):
        load_config("digits", overrides)


@pytest.mark.parametrize(
    ("name", "loss", "tokens", "weight_decay", "warmup_steps"),
    [
        ("rlvr_grpo", "grpo", 10240, 0.01, 0),
        ("rlvr_dapo", "dapo", 10240, 0.1, 10),
        ("rlvr_gspo", "gspo", 20480, 0.1, 75),
    ],
)
def test_recipes_hold_the_published_settings(name, loss, tokens, weight_decay, warmup_steps):
    config = load_config(name)
    stage = config.rlvr
    assert (stage.loss, stage.prompts, stage.rollout.n, stage.steps) == (loss, 32, 16, 1500)
    assert (stage.rollout.max_new_tokens, stage.tokens_per_micro_batch, stage.updates_per_step) == (8192, tokens, 1)
    assert (stage.optimizer.lr, stage.optimizer.weight_decay) == (1e-6, weight_decay)
    assert stage.optimizer.warmup_steps == warmup_steps and config.stages == ["rlvr"]
    assert (config.data.max_prompt_tokens, config.data.on_bad_sample) == (2048, "skip")
    assert stage.dynamic_sampling.enabled == (loss == "dapo") and stage.overlong_factor == 1.0
    assert stage.overlong_buffer == (4096 if loss == "dapo" else 0)
    # 96 prompts at once at most, 10 times
    assert stage.dynamic_sampling.max_oversampling * stage.prompts == 96 and stage.dynamic_sampling.max_rounds == 10
