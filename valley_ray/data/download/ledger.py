"""What became of each row: `ledger.parquet`, replaced as a whole, and a journal of what ended since.

The journal makes an outcome survive the driver's death at once; the table is what people and programs read.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Sequence
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

LEDGER_FILE = "ledger.parquet"
JOURNAL_FILE = "journal.jsonl"
_COMMIT_EVERY_S = 10.0
_COMMIT_SHARE = 0.05


class Ledger:
    """The outcomes of `rows`, of earlier runs and of this one. One writer at a time."""

    def __init__(self, directory: Path, rows: Sequence[Row]) -> None:
        """Open the ledger of `directory`; raises DataError where a table is there that is none."""
        self._directory = directory
        self._rows = rows
        self._earlier = _read_table(directory / LEDGER_FILE)
        self._outcomes = {row["download_id"]: _outcome_of(row) for row in self._earlier if row["status"] != PENDING}
        self._outcomes |= {outcome.download_id: outcome for outcome in _read_journal(directory / JOURNAL_FILE)}
        wanted = {_key(row.row_id, row.source, row.download_id, row.start_s) for row in rows}
        self._kept = [
            row
            for row in self._earlier
            if _key(row["row_id"], row["source"], row["download_id"], row["start_s"]) not in wanted
        ]
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
            pq.write_table(pa.Table.from_pylist([*self._kept, *self.rows()], schema=LEDGER_SCHEMA), temporary)
            os.replace(temporary, path)
            (self._directory / JOURNAL_FILE).unlink(missing_ok=True)
        self._committed_at = time.monotonic()
        self._commit_s = self._committed_at - started

    def rows(self) -> Iterable[dict[str, Any]]:
        """This run's rows as the table has them, in order."""
        for row in self._rows:
            values: dict[str, Any] = {"status": PENDING, "error_class": "", "error": "", "attempts": 0}
            outcome = self._outcomes.get(row.download_id)
            if row.error:
                values |= {"status": FAILED, "error_class": DataError.code, "error": row.error}
            elif outcome is not None:
                values |= dataclasses.asdict(outcome)
            place = {name: getattr(row, name) for name in ("row_id", "source", "download_id", "method", "path")}
            window = {"start_s": row.start_s, "end_s": row.end_s, "url": row.shown_url}
            yield {name: (values | place | window).get(name) for name in LEDGER_SCHEMA.names}


def _key(row_id: str, source: str, download_id: str, start_s: float | None) -> tuple[Any, ...]:
    return row_id, source, download_id, start_s


def _read_table(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no ledger ({' '.join(str(error).split())[:120]}); move it away") from error
    if table.schema.names != LEDGER_SCHEMA.names:
        raise DataError(f"{path} is no ledger (columns {', '.join(table.schema.names)}); move it away")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _outcome_of(row: dict[str, Any]) -> Outcome:
    names = {field.name for field in dataclasses.fields(Outcome)}
    return Outcome(**{name: value for name, value in row.items() if name in names})


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
