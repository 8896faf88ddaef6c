"""What a recipe may not hold, whatever the key: YAML that is more than data, numbers that no run can use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

MAX_DEPTH = 20
MAX_CHARS = 200_000
_SIZES = {"tiny", "digits"}  # sections in which every whole number is a size or a count
_AT_LEAST_1 = {
    *("threads", "limit", "batch", "prompts", "max_updates", "eval_every", "tokens_per_micro_batch"),
    *("max_new_tokens", "pairs_per_prompt", "num_experts"),
}
_AT_LEAST_0 = {
    *("seed", "decay_share", "min_improvement", "noise_std", "router_std", "aux_coef", "temperature"),
    *("weight_decay", "initializer_range", "score_reg", "format_penalty"),
}


def check_yaml(text: str, *, mapping: bool) -> None:
    """Refuse YAML that a plain recipe does not need; ValueError says what it is.

    Aliases can make a small file expand without end, tags name objects to build, ``???`` would silently stand for a
    default; a second document, deep nesting and control characters are mistakes. ``mapping``: it is a whole recipe.
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
    """Every number of a configuration (nested dataclasses) is finite, counts are at least 1, amounts not negative.

    Raises:
        ValueError: the first that is not, with its dotted key.
    """
    for section, name, value in _numbers(config, ""):
        key = f"{section}.{name}" if section else name
        if not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r}")
        if value < 1 and (name in _AT_LEAST_1 or (section.split(".")[-1] in _SIZES and isinstance(value, int))):
            raise ValueError(f"{key} must be 1 or more, got {value!r}")
        if value < 0 and name in _AT_LEAST_0:
            raise ValueError(f"{key} must be 0 or more, got {value!r}")


def _numbers(config: Any, section: str) -> Iterator[tuple[str, str, float]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{section}.{field.name}" if section else field.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield section, field.name, one
