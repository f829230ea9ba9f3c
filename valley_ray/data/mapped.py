"""Tables that need not fit in memory: on disk, without a name, and mapped; rows are picked without copying the others.

What nobody looks at is not read, and the system may drop what was.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAPPED_PATTERN = ".mapped-*.tmp"
"""Files that a process leaves which is killed before it has mapped them."""
_ROWS_AT_ONCE = 4096


def mapped(batches: Iterable[pa.RecordBatch], schema: pa.Schema, directory: Path) -> pa.Table:
    """`batches` as a table of `schema` whose bytes lie on the disk of `directory`, as long as somebody holds it.

    Raises:
        pyarrow.ArrowException: a batch does not fit the schema.
    """
    folder = directory if os.access(directory, os.W_OK) else None
    prefix, _, suffix = MAPPED_PATTERN.partition("*")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, suffix=suffix) as file:
        with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
        with pa.memory_map(file.name) as source:
            return pa.ipc.open_file(source).read_all()


class TableRows(Sequence[dict[str, Any]]):
    """The rows of a table as dicts, each made when it is looked at: going through them holds a few thousand."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        places = range(len(self))[place]
        rows: list[dict[str, Any]] = pick(self.table, [places] if isinstance(places, int) else places).to_pylist()
        return rows[0] if isinstance(place, int) else rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def pick(table: pa.Table, rows: Sequence[int] | npt.NDArray[np.int64]) -> pa.Table:
    """The rows of these numbers, in this order. `Table.take` would first copy whole columns of several batches."""
    numbers = np.asarray(rows, np.int64)
    batches = table.to_batches()
    ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
    where = np.searchsorted(ends, numbers, side="right")
    order = np.argsort(where, kind="stable")
    parts = []
    for place in np.unique(where).tolist():
        first = ends[place] - batches[place].num_rows
        parts.append(batches[place].take(pa.array(numbers[order][where[order] == place] - first)))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(parts, schema=table.schema).combine_chunks().take(pa.array(back))
