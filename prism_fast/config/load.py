"""Recipes: YAML files and ``key.sub=value`` overrides, resolved to a :class:`Config`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from prism_fast.config.data import DATA_SETS
from prism_fast.config.errors import ConfigError
from prism_fast.config.run import Config
from prism_fast.recipes.checks import check_numbers, check_yaml
from prism_fast.recipes.hints import how_to_write, nearest


def shipped_recipes() -> list[str]:
    folder = resources.files("prism_fast.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe (the name of a shipped one, or the path of a YAML file) and ``key.sub=value`` overrides.

    Raises:
        ConfigError: the recipe does not exist, a key is unknown, a value has the wrong type or is out of range.
    """
    shipped = shipped_recipes()
    if recipe in shipped:
        text = resources.files("prism_fast.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
        origin = f"recipe {recipe!r}"
    elif Path(recipe).is_file():
        try:
            text, origin = Path(recipe).read_text(encoding="utf-8-sig"), recipe
        except UnicodeDecodeError as error:
            raise ConfigError(f"{recipe}: not UTF-8 text ({error})") from error
    else:
        raise ConfigError(
            f"no recipe {recipe!r}: neither a file nor a shipped recipe "
            f"({', '.join(shipped)}){nearest(recipe, shipped)}"
        )
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} must have the form key.sub=value")
        _checked(lambda value=value: check_yaml(value, mapping=False), f"override {key!r}")
    _checked(lambda: check_yaml(text, mapping=True), origin)
    try:
        config = OmegaConf.structured(Config)
        config = OmegaConf.merge(config, OmegaConf.create(text))
        for key in (override.partition("=")[0] for override in overrides):
            if key in DATA_SETS:  # replaces the recipe's, which may be a list where this is a mapping
                OmegaConf.update(config, key, None)
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        resolved = OmegaConf.to_object(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{origin}: {error.__cause__}") from error
        message = str(error.msg or error).strip().splitlines()[0]
        if isinstance(error, ConfigKeyError) and "Did you mean" not in message and is_dataclass(error.object_type):
            message += f", which has {', '.join(entry.name for entry in fields(error.object_type))}"
        if key := getattr(error, "full_key", None):
            given = dict(override.split("=", 1) for override in overrides).get(key)
            message += f" (key {key}){how_to_write(Config, key, given)}"
        raise ConfigError(f"{origin} with {list(overrides)}: {message}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a duplicate key, a number of thousands of digits
        raise ConfigError(f"{origin} with {list(overrides)}: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, Config)
    _checked(lambda: check_numbers(resolved), origin)
    return resolved


def _checked(check: Callable[[], None], origin: str) -> None:
    try:
        check()
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
