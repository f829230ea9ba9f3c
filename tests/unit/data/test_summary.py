"""Counts of a ledger: a clip or a place that is named twice is never 0 repeated rows."""

from typing import Any

import pyarrow as pa
import pytest

from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK
from valley_ray.data.summary import counts_of_clips


def row(clip_id: str, shard: str | None, number: int | None, status: str = OK) -> dict[str, Any]:
    return {"clip_id": clip_id, "shard": shard, "row": number, "status": status, "error_class": "x"}


GOOD = [
    row("a", "s", 0),
    row("b", "s", 1),
    row("c", "t", 0),
    row("d", None, None, FAILED),
    row("e", None, None, FAILED),
]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [(GOOD, 0), ([*GOOD, row("a", "t", 1)], 1), ([*GOOD, row("f", "s", 1)], 1), ([*GOOD, GOOD[3]], 1), ([], 0)],
)
def test_repeated_rows_are_clips_or_places_named_again(rows: list[dict[str, Any]], wanted: int) -> None:
    table = pa.Table.from_pylist(rows, schema=CLIPS_SCHEMA)
    counts = counts_of_clips(table, table)
    assert counts["repeated_rows"] == wanted
    assert counts["rows_in"] == len(rows) == counts["ok"] + counts["failed"]
