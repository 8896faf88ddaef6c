"""Files as records: JSON, JSON lines, and data sets in Arrow files; `prism_fast.data.parquet` has those in parquet.

JSON is read here and not by `datasets`, whose errors name neither line nor row and whose columns must have one type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from prism_fast.data.problems import DataError, Place

ROWS_PER_BATCH = 64
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson")


class Records(Protocol):
    """The rows of one file or data set, in order. ``schema``: of its columns; None for JSON, where rows differ."""

    path: Path
    schema: pa.Schema | None

    def select(self, columns: list[str]) -> None:
        """Read these columns only."""

    def rows(self) -> Iterator[tuple[Place, Any]]:
        """Every row with its place; a DataError instead of a row that cannot be read."""

    def cell(self, row: int, column: str) -> Any:
        """The value of a column in row ``row``, read anew."""


class JsonRecords:
    """A JSON list, or JSON lines: a file is what its first character says, whatever its name ends with."""

    schema = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def select(self, columns: list[str]) -> None:
        raise TypeError("rows of JSON are read whole")

    def cell(self, row: int, column: str) -> Any:
        raise TypeError("rows of JSON stay in memory")

    def rows(self) -> Iterator[tuple[Place, Any]]:
        text = self._text()
        start = text.lstrip()[:1]
        lines = self.path.suffix != ".json"
        if start == "[" or (not lines and start != "{"):
            yield from self._list(text)
        elif lines:
            yield from self._lines(text)
        else:
            yield from self._objects(text)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise Place(self.path).error("", f"is not UTF-8 text ({error})", "Save it as UTF-8") from error

    def _lines(self, text: str) -> Iterator[tuple[Place, Any]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = Place(self.path, f"line {number}")
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield place, place.error("", f"not valid JSON ({error})", "One complete JSON object per line")

    def _list(self, text: str) -> Iterator[tuple[Place, Any]]:
        place = Place(self.path)
        for number, record in enumerate(place.listing(self._loaded(text), "")):
            yield Place(self.path, f"row {number}"), record

    def _objects(self, text: str) -> Iterator[tuple[Place, Any]]:
        """A file named .json that begins with an object: JSON lines, which `datasets` writes under this name."""
        first, _, rest = text.strip().partition("\n")
        try:
            json.loads(first)
            lines = bool(rest)
        except (ValueError, RecursionError):
            lines = False
        if lines:
            yield from self._lines(text)
            return
        found = self._loaded(text)
        listed = [key for key, value in found.items() if isinstance(value, list)] if isinstance(found, dict) else []
        cure = f"Write the list under {listed[0]!r} into a file of its own" if listed else "Write a list of records"
        raise Place(self.path).error("", f"is of type {type(found).__name__}, wanted a list", cure)

    def _loaded(self, text: str) -> Any:
        place = Place(self.path)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            place = Place(self.path, f"line {error.lineno}, column {error.colno}")
            raise place.error("", f"not valid JSON ({error.msg})", "Mend it there") from error
        except (ValueError, RecursionError) as error:
            wrong = "is nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON ({error})"
            raise place.error("", wrong, "Records hold turns and image paths only") from error


class ArrowRecords:
    """A data set of the library `datasets`, memory-mapped; nothing is decoded, images stay {bytes, path}."""

    def __init__(self, path: Path, dataset: Any) -> None:
        """``path``: its name in places; ``dataset``: a ``datasets.Dataset``."""
        self.path, self._dataset = path, dataset.with_format("arrow")
        self.schema: pa.Schema = dataset.features.arrow_schema

    def select(self, columns: list[str]) -> None:
        self._rows = self._dataset.select_columns(columns)

    def rows(self) -> Iterator[tuple[Place, Any]]:
        for start in range(0, len(self._dataset), ROWS_PER_BATCH):
            batch = self._rows[start : start + ROWS_PER_BATCH]
            for number, record in enumerate(batch.to_pylist(), start=start):
                yield Place(self.path, f"row {number}"), record

    def cell(self, row: int, column: str) -> Any:
        try:
            return self._dataset.select_columns([column])[row : row + 1].column(0)[0].as_py()
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row {row}")
            raise place.error(column, f"cannot be read any more ({error})", "Put the file back and resume") from error


def damaged(path: Path, error: Exception) -> DataError:
    """The error of a data set whose files cannot be opened."""
    return Place(path).error("", f"cannot be read ({error})", "The file is damaged: copy or write it again")
