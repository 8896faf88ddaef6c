"""Benchmarks that ship with the package. In a checkout their files stand in ``bench/<area>`` beside it."""

from __future__ import annotations

from pathlib import Path

_source = Path(__file__).resolve().parents[2] / "bench"
if (_source.parent / "setup.py").is_file() and _source.is_dir():
    __path__.append(str(_source))
