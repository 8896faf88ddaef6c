"""Compares the recipe of a checkpoint with that of the run that goes on from it."""

from __future__ import annotations

import yaml

from prism_fast.config import CONTROLS

# What may differ when a run goes on: it changes no number that is learnt from.
FREE_ON_RESUME = (
    *("out", "device", "threads", "checkpoint_every", "keep_checkpoints", "dump_rollouts_every", "track", "profile"),
)


def changed_keys(before: str, now: str) -> dict[str, tuple[object, object]]:
    """Keys of two resolved configurations (YAML) whose values differ, with both values; those of `FREE_ON_RESUME` are
    left out."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(now))
    differ = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    return {key: values for key, values in differ.items() if key.split(".")[0] not in FREE_ON_RESUME}


# Numbers of steps that may grow, and the stage that they belong to.
LENGTHS = {"sft.max_updates": "sft", "align.steps": "align", "rlvr.steps": "rlvr"}


def raised_lengths(before: str, now: str) -> dict[str, tuple[int, int]]:
    """Keys of `LENGTHS` that are larger in the second of two resolved configurations (YAML), with both values."""
    changed = changed_keys(before, now)
    return {key: values for key, values in changed.items() if key in LENGTHS and values[1] > values[0]}


def why_not_longer(key: str, config: str) -> str | None:
    """The reason why a run with ``config`` (YAML) cannot go on with a larger ``key``; None: it can, and the steps that
    it has made are those of a run that was longer from its start."""
    flat, stage = _flat(yaml.safe_load(config)), LENGTHS[key]
    if flat.get(f"{stage}.epochs") is not None:
        return f"{stage}.epochs={flat[f'{stage}.epochs']} is its length"
    if stage == "sft" and flat["sft.ends"] == "plateau":
        return "with sft.ends=plateau the learning rate falls towards it"
    for optimizer in (f"{stage}.optimizer", "align.discriminator.optimizer")[: 2 if stage == "align" else 1]:
        for name, fixed in {"schedule": "constant", "warmup_share": 0.0}.items():
            if (value := flat[f"{optimizer}.{name}"]) != fixed:
                return f"{optimizer}.{name}={value} follows it, so that the steps made are those of a shorter run"
    if stage != "sft" and (controls := [name for name in flat["stages"] if name in CONTROLS]):
        return f"{', '.join(controls)} in stages would have another number of updates than what they are compared with"
    return None


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
