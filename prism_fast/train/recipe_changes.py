"""Compares the recipe of a checkpoint with that of the run that goes on from it."""

from __future__ import annotations

import yaml

# What may differ when a run goes on: it changes no number that is learnt from.
FREE_ON_RESUME = ("out", "device", "threads", "checkpoint_every", "keep_checkpoints", "dump_rollouts_every", "track")


def changed_keys(before: str, now: str) -> dict[str, tuple[object, object]]:
    """Keys of two resolved configurations (YAML) whose values differ, with both values; those of `FREE_ON_RESUME` are
    left out."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(now))
    differ = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    return {key: values for key, values in differ.items() if key.split(".")[0] not in FREE_ON_RESUME}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
