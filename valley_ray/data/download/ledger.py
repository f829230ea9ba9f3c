"""What became of each row: `ledger.parquet`, replaced as a whole, and a journal of what ended since.

The journal makes an outcome survive the driver's death at once; the table is what people and programs read.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.download.attempt import Outcome
from valley_ray.data.download.partial import disk_errors
from valley_ray.data.download.sources import Row
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.errors import DataError

LEDGER_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("download_id", pa.string()),
        ("method", pa.string()),
        ("url", pa.string()),
        ("path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("size_bytes", pa.int64()),
        ("seconds", pa.float64()),
        ("sha256", pa.string()),
        ("etag", pa.string()),
    ]
)
"""ledger. url: without user and query, which often are secrets; download_id: a hash of method and whole URL, which rows
of one URL share. path: relative to the media root. attempts: 0 for a file that was there. seconds: over all attempts.
Rows of earlier runs that are in no present list are kept."""

_OUTCOME_COLUMNS = ("status", "error_class", "error", "attempts", "size_bytes", "seconds", "sha256", "etag")

LEDGER_FILE = "ledger.parquet"
JOURNAL_FILE = "journal.jsonl"
_COMMIT_EVERY_S = 10.0
_COMMIT_SHARE = 0.05
_ROWS_AT_ONCE = 8192


class Ledger:
    """The outcomes of `rows`, of earlier runs and of this one. One writer at a time."""

    def __init__(self, directory: Path, rows: Sequence[Row]) -> None:
        """Open the ledger of `directory`; raises DataError where a table is there that is none."""
        self._directory = directory
        self._rows = rows
        self._outcomes: dict[str, Outcome] = {}
        self._kept: list[dict[str, Any]] = []
        table = directory / LEDGER_FILE
        wanted = {_key(row.row_id, row.source, row.download_id, row.start_s) for row in rows if table.exists()}
        for row in _read_table(table):
            # A row that could not be used says nothing about the download of its URL, which others may share.
            if row["status"] != PENDING and row["error_class"] != DataError.code:
                self._outcomes[row["download_id"]] = _outcome_of(row)
            if _key(row["row_id"], row["source"], row["download_id"], row["start_s"]) not in wanted:
                self._kept.append(row)
        self._outcomes |= {outcome.download_id: outcome for outcome in _read_journal(directory / JOURNAL_FILE)}
        self._known_paths = {outcome.path for outcome in self._outcomes.values() if outcome.status == OK}
        self._committed_at, self._commit_s = time.monotonic(), 0.0

    def outcome(self, download_id: str) -> Outcome | None:
        """What came of a download; None while it is pending."""
        return self._outcomes.get(download_id)

    def is_known_path(self, path: str) -> bool:
        """Whether the file there was put there by a recorded download, as opposed to found."""
        return path in self._known_paths

    def forget(self, download_id: str) -> None:
        """Make a download pending again."""
        self._outcomes.pop(download_id, None)

    def record(self, outcome: Outcome) -> None:
        """Keep an outcome (ok or failed), even if this process dies now; commit the table where that is due."""
        assert outcome.status in (OK, FAILED), f"only what ended is recorded, got {outcome}"
        self._outcomes[outcome.download_id] = outcome
        path = self._directory / JOURNAL_FILE
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        pause_s = max(_COMMIT_EVERY_S, self._commit_s / _COMMIT_SHARE)
        if time.monotonic() - self._committed_at > pause_s:
            self.commit()

    def commit(self) -> None:
        """Write the table, whole and at once, then empty the journal."""
        started = time.monotonic()
        path = self._directory / LEDGER_FILE
        temporary = path.with_name(f".{path.name}.tmp")
        with disk_errors(path):
            write_rows(temporary, itertools.chain(self._kept, self.rows()), LEDGER_SCHEMA)
            os.replace(temporary, path)
            (self._directory / JOURNAL_FILE).unlink(missing_ok=True)
        self._committed_at = time.monotonic()
        self._commit_s = self._committed_at - started

    def rows(self) -> Iterable[dict[str, Any]]:
        """This run's rows as the table has them, in order."""
        for row in self._rows:
            outcome = self._outcomes.get(row.download_id)
            if row.error:
                came = Outcome(row.download_id, row.path, FAILED, error_class=DataError.code, error=row.error)
            else:
                came = outcome or Outcome(row.download_id, row.path, PENDING)
            yield {
                "row_id": row.row_id,
                "source": row.source,
                "download_id": row.download_id,
                "method": row.method,
                "url": row.shown_url,
                "path": row.path,
                "start_s": row.start_s,
                "end_s": row.end_s,
                **{name: getattr(came, name) for name in _OUTCOME_COLUMNS},
            }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows to Parquet as they come, so that memory holds a few thousand of them."""
    waiting = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(waiting, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _key(row_id: str, source: str, download_id: str, start_s: float | None) -> int:
    """What tells rows apart, as a number, since there may be a million."""
    return hash((row_id, source, download_id, start_s))


def _read_table(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if names != LEDGER_SCHEMA.names:
                raise DataError(f"{path} is no ledger (columns {', '.join(names)}); move it away")
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no ledger ({' '.join(str(error).split())[:120]}); move it away") from error


def _outcome_of(row: dict[str, Any]) -> Outcome:
    return Outcome(row["download_id"], row["path"], **{name: row[name] for name in _OUTCOME_COLUMNS})


def _read_journal(path: Path) -> list[Outcome]:
    """Whole lines only: the last one may have been cut off by the end of its writer."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    outcomes = []
    for line in lines:
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return outcomes
