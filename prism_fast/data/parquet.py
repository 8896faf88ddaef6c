"""Parquet files of tasks: column types checked at opening, rows streamed, encoded images read a row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.problems import Place

ROWS_PER_BATCH = 64
TEACHER_COLUMNS = ("teacher_response", "teacher_caption", "teacher_cot")
Check = Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text_or_null(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType, item: Check) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return listed and (item(kind.value_type) or pa.types.is_null(kind.value_type))


def _is_struct(kind: pa.DataType, **fields: Check) -> bool:
    """A struct that has all ``fields``, each of its kind; further fields are free."""
    if not pa.types.is_struct(kind):
        return False
    present = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return all(name in present and check(present[name]) for name, check in fields.items())


def _is_turn(kind: pa.DataType) -> bool:
    return _is_struct(kind, role=_is_text, content=_is_text)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return bool(names & {"bytes", "path", "image", "image_url"})
    return _is_text(kind) or _is_bytes(kind)


def _is_reward_model(kind: pa.DataType) -> bool:
    return _is_struct(kind, ground_truth=_is_text)


_COLUMNS: dict[str, tuple[Check, str]] = {
    "prompt": (lambda kind: _is_list(kind, _is_turn), "list<struct<role: string, content: string>>"),
    "images": (
        lambda kind: pa.types.is_null(kind) or _is_list(kind, _is_image),
        "list<struct<bytes: binary, path: string>> (or a list of paths or of binary)",
    ),
    "data_source": (_is_text, "string"),
    **{name: (_is_text_or_null, "string") for name in (*TEACHER_COLUMNS, "answer")},
    "reward_model": (
        _is_reward_model,
        "struct<ground_truth: string, style: string, equivalent_answers: list<string>>",
    ),
    "extra_info": (lambda kind: pa.types.is_null(kind) or pa.types.is_struct(kind), "struct"),
}
_REQUIRED = ("prompt", "data_source", "reward_model")


class TaskFile:
    """One parquet file with the published columns; DataError at once if a column lacks or has another type."""

    def __init__(self, path: Path, *, require_teacher: bool) -> None:
        self.path = path
        place = Place(path)
        if not path.is_file():
            raise place.error("", "the file does not exist", "Check the path")
        try:
            metadata = pq.read_metadata(path)
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise place.error("", f"is not a parquet file ({error})", "Write it as parquet") from error
        required = (*_REQUIRED, *TEACHER_COLUMNS) if require_teacher else _REQUIRED
        for name in required:
            if name not in schema.names:
                wrong = f"the column is missing (the file has: {', '.join(schema.names)})"
                cure = "Add it, or use data with teacher texts" if name in TEACHER_COLUMNS else "Add it"
                raise place.error(name, wrong, cure)
        for name, (check, wanted) in _COLUMNS.items():
            if name in schema.names and not check(schema.field(name).type):
                wrong = f"the column has type {schema.field(name).type}, wanted {wanted}"
                raise place.error(name, wrong, "Convert the column")
        self._columns = [name for name in _COLUMNS if name in schema.names]
        if "videos" in schema.names:
            self._columns.append("videos")
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Every row in file order, images still encoded; a small batch of rows is in memory at a time."""
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=self._columns):
                    for value in batch.to_pylist():
                        yield Place(self.path, f"row {row}"), value
                        row += 1
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row {row} or later")
            raise place.error("", f"cannot be read ({error})", "The file is damaged: copy or write it again") from error

    def read_group(self, group: int) -> pa.Table:
        """The ``images`` column of one row group."""
        try:
            with pq.ParquetFile(self.path) as file:
                return file.read_row_group(group, columns=["images"])
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row group {group}")
            raise place.error("images", f"cannot be read any more ({error})", "Put the file back and resume") from error

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, row inside it) of a file row."""
        group = next(index for index, end in enumerate(self._ends) if row < end)
        return group, row - (self._ends[group - 1] if group else 0)


class EncodedImages:
    """Encoded image entries by (file, row); the ``keep`` row groups used last stay in memory, undecoded."""

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()

    def entries(self, file: TaskFile, row: int) -> list[Any]:
        group, inside = file.locate(row)
        key = (file.path, group)
        table = self._groups.pop(key, None)
        if table is None:
            table = file.read_group(group)
        self._groups[key] = table
        while len(self._groups) > self._keep:
            self._groups.popitem(last=False)
        return table.slice(inside, 1).column("images").to_pylist()[0]


