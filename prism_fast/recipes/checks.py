"""Checks of every key of a recipe: YAML must be plain data, and numbers must be in range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

MAX_DEPTH = 20
MAX_CHARS = 200_000
MAX_WHOLE = 2**63 - 1
_SIZES = {"tiny", "digits"}  # sections in which every whole number is a size or a count
_AT_LEAST_1 = {
    *(
        "samples",
        "threads",
        "limit",
        "batch",
        "prompts",
        "max_updates",
        "eval_every",
        "patience",
        "tokens_per_micro_batch",
        "n",
    ),
    *("max_new_tokens", "pairs_per_prompt", "num_experts", "updates", "max_rounds", "max_oversampling"),
    *("dump_rollouts_every", "checkpoint_every", "keep_checkpoints", "max_image_pixels", "max_prompt_tokens"),
    *("min_pixels", "max_pixels"),
    *("workers", "tokens_in_flight", "importance_threshold", "max_answer_chars", "attempts", "concurrency"),
}
_ANY = {"target_margin"}  # may be negative: the first evaluation then ends the warm-up
# Every other number must be 0 or more.
_ABOVE_0 = {
    *("lr", "clip_norm", "initializer_range", "continued_lr_scale", "score_clip", "epochs", "alpha", "top_p"),
    *("timeout_s", "patience_s"),
}
_AT_MOST = {
    **dict.fromkeys(("lr", "weight_decay", "decay_share", "noise", "initializer_range", "warmup_share", "top_p"), 1),
    **dict.fromkeys(("threads", "workers", "concurrency"), 1024),
    "timeout_s": 3600,
    "patience_s": 7 * 24 * 3600,
}
_BELOW = {"betas": 1, "min_improvement": 1}


def check_yaml(text: str, *, mapping: bool) -> None:
    """Raise ValueError for YAML that a plain recipe does not need.

    Aliases can make a small file expand without end, tags name objects to build, ``???`` would silently be a default; a
    second document, deep nesting and control characters are mistakes. ``mapping``: ``text`` is a whole recipe.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters; at most {MAX_CHARS} are read")
    depth = documents = 0
    try:
        text.encode()
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"YAML aliases (*{event.anchor}) are not read; write the value out")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"YAML tags ({event.tag}) are not read; write a plain value")
            if isinstance(event, yaml.ScalarEvent) and event.value == "???":
                raise ValueError("??? is no value; leave the key out to get its default")
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise ValueError("more than one YAML document; keep one")
            if mapping and depth == 0 and isinstance(event, yaml.SequenceStartEvent | yaml.ScalarEvent):
                found = "a list" if isinstance(event, yaml.SequenceStartEvent) else repr(event.value[:40])
                raise ValueError(f"the file is {found}; a recipe holds key: value lines")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode ({error.reason})") from error


def check_numbers(config: Any) -> None:
    """Check that every number of a configuration (nested dataclasses) is finite and in the range of its key.

    Raises:
        ValueError: names the first number that is not, by its dotted key.
    """
    for section, name, value in _numbers(config, ""):
        key = f"{section}.{name}" if section else name
        if not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r}")
        size = section.split(".")[-1] in _SIZES and isinstance(value, int)
        low = -math.inf if name in _ANY else 1 if name in _AT_LEAST_1 or size else 0
        most = _AT_MOST.get(name, MAX_WHOLE if isinstance(value, int) else value)
        wanted = "positive" if name in _ABOVE_0 else f"{low} or more"
        wanted += f" and at most {most}" if name in _AT_MOST or value > most else ""
        wanted += f" and below {_BELOW[name]}" if name in _BELOW else ""
        if value < low or value > most or (name in _ABOVE_0 and value == 0) or value >= _BELOW.get(name, math.inf):
            raise ValueError(f"{key} must be {wanted}, got {value!r}")


def _numbers(config: Any, section: str) -> Iterator[tuple[str, str, float]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{section}.{field.name}" if section else field.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield section, field.name, one
