"""Recipes and overrides: what is wrong is named, what is resolved reads back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from prism_fast.config import Config, ConfigError, control_updates, dump_config, load_config, shipped_recipes
from prism_fast.recipes.checks import check_numbers


def test_every_shipped_recipe_resolves_and_reads_back(tmp_path):
    assert "digits" in shipped_recipes()
    for recipe in shipped_recipes():
        config = load_config(recipe)
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(str(path)) == config


def test_rlvr_from_sft_runs_in_the_demo_alone():
    assert {name for name in shipped_recipes() if "rlvr_direct" in load_config(name).stages} == {"digits"}
    assert "rlvr_direct" not in Config().stages


def test_controls_have_the_updates_of_the_stages_that_run():
    steps = ["align.steps=3", "rlvr.steps=5", "rlvr.updates_per_step=2"]
    assert control_updates(load_config("digits", steps)) == 13
    assert control_updates(load_config("digits", [*steps, "stages=[sft,sft_continued,rlvr]"])) == 10


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
        ("stages=[sft,rlvr_direct,warmup]", ["stages", "rlvr_direct", "align and rlvr"]),
        ("stages=[sft_continued]", ["stages", "sft_continued", "align and rlvr"]),
        ("data.digits.noise=1.5", ["data.digits.noise", "0 or more and at most 1"]),
        ("align.rollout.temperature=-1", ["align.rollout.temperature", "positive"]),
        ("rlvr.optimizer.lr=0", ["rlvr.optimizer.lr", "positive and at most 1"]),
        ("sft.decay_share=3", ["sft.decay_share must be 0 or more and at most 1, got 3.0"]),
        ("sft.min_improvement=1", ["sft.min_improvement must be 0 or more and below 1"]),
        ("warmup.upcycle.top_k=9", ["top_k", "num_experts"]),
        ("warmup.heldout_share=1.0", ["heldout_share"]),
        ("sft.optimizer.betas=[0.9, 1.0]", ["sft.optimizer.betas", "below 1"]),
        ("align.weights=[0,0]", ["align.weights", "one of them above 0"]),
        ("rlvr.rollout.max_new_tokens=0", ["rlvr.rollout.max_new_tokens must be 1 or more"]),
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


def numbers(config: object, path: str = "") -> Iterator[tuple[str, object, str]]:
    """(dotted key, section, name) of every number of a configuration, also of those that may be null."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value, kinds = getattr(config, entry.name), {hints[entry.name], *get_args(hints[entry.name])}
        if is_dataclass(value):
            yield from numbers(value, f"{path}{entry.name}.")
        elif {int, float} & kinds:
            yield path + entry.name, config, entry.name


def test_every_number_has_a_range_and_is_named_with_it():
    config = Config()
    found = list(numbers(config))
    for key, section, name in found:
        value = getattr(section, name)
        least = "" if key == "warmup.target_margin" else "must be"  # a margin may be anything
        for bad, words in ((-1, least), (float("inf"), "must be a finite number"), (2**63, "")):
            setattr(section, name, (0.5, bad) if isinstance(value, tuple) else bad)
            if words or isinstance(value, int):
                with pytest.raises(ValueError, match=f"^{re.escape(key)} {words}"):
                    check_numbers(config)
        setattr(section, name, value)
    check_numbers(config)
    assert len(found) > 80


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"digits.*Did you mean 'digits'"):
        load_config("digit")


def test_an_unknown_key_in_a_recipe_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sft:\n  batchsize: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*batchsize"):
        load_config(str(path))


def test_data_sets_as_lists_and_mappings(tmp_path):
    """They survive the saved configuration; an override of the key replaces the recipe's, one below it changes it."""
    recipe = tmp_path / "mine.yaml"
    listed = ["a.json", {"path": "b/*.parquet", "columns": {"problem": "q"}}]
    recipe.write_text(f"data: {{rlvr: {json.dumps(listed)}, sft: {{path: c.json, split: train}}}}\n")
    config = load_config(str(recipe))
    assert config.data.rlvr == listed and config.data.sft == {"path": "c.json", "split": "train"}
    recipe.write_text(dump_config(config))
    assert load_config(str(recipe)) == config
    changed = load_config(str(recipe), ["data.rlvr={path: x}", "data.sft.path=d.json", "data.columns.answer=gold"])
    assert changed.data.rlvr == {"path": "x"} and changed.data.columns == {"answer": "gold"}
    assert changed.data.sft == {"path": "d.json", "split": "train"}
    assert load_config(str(recipe), ["data.sft=[a,b]"]).data.sft == ["a", "b"]
    with pytest.raises(ConfigError, match="Cannot merge"):
        load_config(str(recipe), ["data.rlvr.0=x"])
