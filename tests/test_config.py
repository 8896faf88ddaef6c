"""Recipes and overrides: what is wrong is named, what is resolved reads back."""

from __future__ import annotations

import pytest

from prism_fast.config import Config, ConfigError, dump_config, load_config, shipped_recipes


def test_every_shipped_recipe_resolves_and_reads_back(tmp_path):
    assert "digits" in shipped_recipes()
    for recipe in shipped_recipes():
        config = load_config(recipe)
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(str(path)) == config


def test_overrides_win_over_the_recipe():
    config = load_config(
        "digits", ["seed=7", "align.rollout.n=3", "sft.optimizer.betas=[0.8,0.9]", "stages=[sft,rlvr]"]
    )
    assert isinstance(config, Config)
    assert (config.seed, config.align.rollout.n, config.sft.optimizer.betas) == (7, 3, (0.8, 0.9))
    assert config.stages == ["sft", "rlvr"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sft.optimiser.lr=1", ["optimiser", "optimizer"]),
        ("seeed=1", ["seeed", "seed"]),
        ("sft.lerning_rate=1", ["lerning_rate", "max_updates", "tokens_per_micro_batch", "optimizer"]),
        ("align.rollout.temperatur=1", ["temperatur", "temperature"]),
        ("seed=one", ["one", "seed"]),
        ("semantics=papr", ["papr", "released"]),
        ("model.dtype=float16", ["float16", "bfloat16"]),
        ("stages=[sft,algn]", ["algn", "align"]),
        ("stages=[rlvr,sft]", ["stages", "order"]),
        ("data.digits.noise=1.5", ["data.digits.noise", "between 0 and 1"]),
        ("align.rollout.temperature=-1", ["temperature", "positive"]),
        ("rlvr.optimizer.lr=0", ["optimizer.lr", "positive"]),
        ("warmup.upcycle.top_k=9", ["top_k", "num_experts"]),
        ("warmup.heldout_share=1.0", ["heldout_share"]),
        ("sft.optimizer.betas=[0.9, 1.0]", ["betas", "below 1"]),
        ("rlvr.rollout.n=1", ["rlvr.rollout.n", "2 or more"]),
        ("align.rollout.temperature=0", ["align.rollout.temperature", "greedy"]),
        ("seed", ["key.sub=value"]),
    ],
)
def test_a_wrong_override_is_named_with_its_cure(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [override])
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"digits.*Did you mean 'digits'"):
        load_config("digit")


def test_an_unknown_key_in_a_recipe_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sft:\n  batchsize: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*batchsize"):
        load_config(str(path))
