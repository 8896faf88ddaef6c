"""Parquet files: column types checked at opening, rows streamed, encoded images read some rows at a time.

Files may be far larger than memory, and a writer may have put all rows into one row group (pandas does). Columns are
therefore read through a small buffer, page by page, and never as a whole row group. They are read where they lie:
`datasets` would first copy them, images included, into its cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_fast.data.problems import Place

ROWS_PER_BATCH = 64
_READ_BUFFER = 2**20


class ParquetRecords:
    """One parquet file; DataError at once if it is none."""

    def __init__(self, path: Path, encoded: EncodedCells | None = None) -> None:
        """``encoded``: shared by the files that are open together."""
        self.path = path
        try:
            metadata = pq.read_metadata(path)
            self.schema: pa.Schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise Place(path).error("", f"is not a parquet file ({error})", "Write it as parquet") from error
        self._encoded = encoded or EncodedCells()
        self._columns = list(self.schema.names)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        # By column: row group, next block in it, the rest
        self._cursors: dict[str, tuple[int, int, Iterator[pa.RecordBatch]]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def select(self, columns: list[str]) -> None:
        self._columns = columns

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

    def cell(self, row: int, column: str) -> Any:
        return self._encoded.cell(self, row, column)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(row group, block of `ROWS_PER_BATCH` rows inside it, row inside the block) of a file row."""
        group = bisect_right(self._ends, row)
        inside = row - (self._ends[group - 1] if group else 0)
        return group, inside // ROWS_PER_BATCH, inside % ROWS_PER_BATCH

    def read_block(self, group: int, block: int, column: str) -> pa.Array:
        """A column of one block of rows. A later block of the same row group continues where the last call stopped; an
        earlier one reads the group from its beginning."""
        try:
            cursor = self._cursors.pop(column, None)  # if reading fails, the next call opens the file again
            if cursor is None or cursor[0] != group or cursor[1] > block:
                cursor = (group, 0, self._blocks(group, column))
            _, position, blocks = cursor
            for batch in islice(blocks, block - position, None):
                self._cursors[column] = (group, block + 1, blocks)
                return batch.column(0)
        except (pa.ArrowException, OSError) as error:
            place = Place(self.path, f"row group {group}")
            raise place.error(column, f"cannot be read any more ({error})", "Put the file back and resume") from error
        raise Place(self.path, f"row group {group}").error(column, "has fewer rows than before", "Put the file back")

    def _blocks(self, group: int, column: str) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
            yield from file.iter_batches(
                batch_size=ROWS_PER_BATCH, row_groups=[group], columns=[column], use_threads=False
            )


class EncodedCells:
    """Encoded images by (file, row, column). The most recently used blocks of rows stay in memory, undecoded, up to
    ``keep_bytes`` in total; the newest always stays."""

    def __init__(self, keep_bytes: int = 2**28) -> None:
        self._keep_bytes = keep_bytes
        self._blocks: OrderedDict[tuple[Path, str, int, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def cell(self, file: ParquetRecords, row: int, column: str) -> Any:
        group, block, inside = file.locate(row)
        key = (file.path, column, group, block)
        values = self._blocks.pop(key, None)
        if values is None:
            values = file.read_block(group, block, column)
            self._bytes += values.nbytes
        self._blocks[key] = values
        while self._bytes > self._keep_bytes and len(self._blocks) > 1:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes
        return values[inside].as_py()
