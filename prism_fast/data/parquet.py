"""Parquet files of tasks: column types checked at opening, rows streamed, encoded images read some rows at a time.

Files may be far larger than memory, and a writer may have put all rows into one row group (pandas does). Columns are
therefore read through a small buffer, page by page, and never as a whole row group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.problems import Place

ROWS_PER_BATCH = 64
_READ_BUFFER = 2**20
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
    """A struct that has all ``fields``, each of its type; it may have others."""
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
    """One parquet file with the published columns; DataError at once if a column is missing or has another type."""

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
        self._cursor: tuple[int, int, Iterator[pa.RecordBatch]] | None = None  # row group, next block in it, the rest

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Every row in file order, images still encoded; a small batch of rows is in memory at a time."""
        row = 0
        try:
            with pq.ParquetFile(self.path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=self._columns, use_threads=False):
                    for value in batch.to_pylist():
                        yield Place(self.path, f"row {row}"), value
                        row += 1
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row {row} or later")
            raise place.error("", f"cannot be read ({error})", "The file is damaged: copy or write it again") from error

    def locate(self, row: int) -> tuple[int, int, int]:
        """(row group, block of `ROWS_PER_BATCH` rows inside it, row inside the block) of a file row."""
        group = bisect_right(self._ends, row)
        inside = row - (self._ends[group - 1] if group else 0)
        return group, inside // ROWS_PER_BATCH, inside % ROWS_PER_BATCH

    def read_block(self, group: int, block: int) -> pa.Array:
        """The ``images`` column of one block of rows. A later block of the same row group continues where the last call
        stopped; an earlier one reads the group from its beginning."""
        try:
            if self._cursor is None or self._cursor[0] != group or self._cursor[1] > block:
                self._cursor = (group, 0, self._blocks(group))
            _, position, blocks = self._cursor
            self._cursor = None  # if reading fails, the next call opens the file again
            for batch in islice(blocks, block - position, None):
                self._cursor = (group, block + 1, blocks)
                return batch.column(0)
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row group {group}")
            raise place.error("images", f"cannot be read any more ({error})", "Put the file back and resume") from error
        raise Place(self.path, f"row group {group}").error("images", "has fewer rows than before", "Put the file back")

    def _blocks(self, group: int) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
            yield from file.iter_batches(
                batch_size=ROWS_PER_BATCH, row_groups=[group], columns=["images"], use_threads=False
            )


class EncodedImages:
    """Encoded image entries by (file, row). The most recently used blocks of rows stay in memory, undecoded, up to
    ``keep_bytes`` in total; the newest always stays."""

    def __init__(self, keep_bytes: int = 2**28) -> None:
        self._keep_bytes = keep_bytes
        self._blocks: OrderedDict[tuple[Path, int, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def entries(self, file: TaskFile, row: int) -> list[Any]:
        group, block, inside = file.locate(row)
        key = (file.path, group, block)
        values = self._blocks.pop(key, None)
        if values is None:
            values = file.read_block(group, block)
            self._bytes += values.nbytes
        self._blocks[key] = values
        while self._bytes > self._keep_bytes and len(self._blocks) > 1:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes
        return values[inside].as_py()
