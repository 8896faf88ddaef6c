"""The error of a wrong recipe."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe or an override is wrong; the message names the key and what is allowed."""


def require(condition: bool, key: str, allowed: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")
