"""Tables on disk: rows are picked in any order, and a table outlives the file that it lies in."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from valley_ray.data.mapped import TableRows, mapped, pick

SCHEMA = pa.schema([("number", pa.int64()), ("texts", pa.list_(pa.struct([("text", pa.string())])))])


def rows_of(numbers: range) -> list[dict[str, object]]:
    return [{"number": n, "texts": [{"text": str(n)}] * (n % 3)} for n in numbers]


def make_table(folder: Path) -> pa.Table:
    batches = [pa.RecordBatch.from_pylist(rows_of(range(first, first + 5)), schema=SCHEMA) for first in (0, 5, 10)]
    return mapped(batches, SCHEMA, folder)


def test_rows_are_picked_in_the_order_asked_for(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    assert table.to_pylist() == rows_of(range(15))
    for numbers in (np.random.default_rng(0).permutation(15), np.array([14, 0, 14, 3]), np.array([], np.int64)):
        assert pick(table, numbers).to_pylist() == [rows_of(range(15))[number] for number in numbers]
    assert pick(table.slice(4, 7), [6, 0]).to_pylist() == [rows_of(range(15))[number] for number in (10, 4)]
    assert pick(SCHEMA.empty_table(), []).num_rows == 0


def test_rows_are_a_sequence_of_dicts_that_are_made_when_looked_at(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    rows, wanted = TableRows(table), rows_of(range(15))
    assert (len(rows), list(rows), rows[:]) == (15, wanted, wanted)
    assert (rows[3], rows[-1], rows[4:11:3]) == (wanted[3], wanted[-1], wanted[4:11:3])
    assert rows[3] is not rows[3]
    with pytest.raises(IndexError):
        rows[15]


def test_no_file_is_left_and_none_is_needed(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert table["number"].to_pylist() == list(range(15))


def test_batches_of_another_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises((pa.ArrowException, ValueError)):
        mapped([pa.RecordBatch.from_pylist([{"x": 1}])], SCHEMA, tmp_path)
    assert list(tmp_path.iterdir()) == []
