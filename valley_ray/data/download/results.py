"""What a run of downloads leaves beside its ledger: the files as clips to decode, and a summary."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from valley_ray.data.commit import write_json
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.ledger import LEDGER_FILE, write_rows
from valley_ray.data.download.partial import disk_errors
from valley_ray.data.download.progress import Progress
from valley_ray.data.download.sources import Row
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK
from valley_ray.data.sources import clip_row

CLIPS_FILE = "clips.parquet"
SUMMARY_FILE = "summary.json"


@dataclasses.dataclass(frozen=True)
class DownloadSummary:
    """What came of a run; `rows_in` = `ok` + `failed` always."""

    rows_in: int
    ok: int
    failed: int
    by_error_class: dict[str, int]
    """Failed rows by class."""
    examples: dict[str, str]
    """The first failed row of each class: its id and the reason."""
    num_files: int
    """Different URLs among the rows that could be used."""
    files_fetched: int
    """Files that this run put in place."""
    files_found: int
    """Files that were there without a record, passed the checks and were taken as they were."""
    files_taken_over: int
    """Downloads that earlier runs had ended, well or badly; nothing was asked for them."""
    duplicate_rows: int
    """Rows that share the download of an earlier row."""
    retries: int
    """Attempts after the first ones."""
    fetched_bytes: int
    seconds: float
    files_per_s: float
    megabytes_per_s: float
    ledger: str
    clips: str


def write_results(
    config: DownloadConfig, rows: Sequence[Row], ended: Iterable[Mapping[str, Any]], progress: Progress
) -> DownloadSummary:
    """Write clips table and summary of `rows`; `ended` are their rows of the ledger. Raises StorageError."""
    folder, statuses = config.ledger_folder, Counter[str]()
    failed, examples = Counter[str](), dict[str, str]()

    def counted() -> Iterator[Mapping[str, Any]]:
        for row in ended:
            statuses[row["status"]] += 1
            if row["status"] == FAILED:
                failed[row["error_class"]] += 1
                examples.setdefault(row["error_class"], f"{row['row_id']}: {row['error']}")
            yield row

    with disk_errors(folder / CLIPS_FILE):
        temporary = folder / f".{CLIPS_FILE}.tmp"
        write_rows(temporary, _clips(config, counted()), CLIPS_SCHEMA)
        os.replace(temporary, folder / CLIPS_FILE)
    summary = DownloadSummary(
        rows_in=len(rows),
        ok=statuses[OK],
        failed=statuses[FAILED],
        by_error_class=dict(failed.most_common()),
        examples=examples,
        num_files=progress.num_files,
        files_fetched=progress.ended[OK] - progress.found,
        files_found=progress.found,
        files_taken_over=progress.taken_over,
        duplicate_rows=sum(not row.error for row in rows) - progress.num_files,
        retries=progress.retries,
        fetched_bytes=progress.fetched_bytes,
        seconds=round(progress.seconds, 3),
        files_per_s=round(progress.num_ended / progress.seconds, 3),
        megabytes_per_s=round(progress.fetched_bytes / 1e6 / progress.seconds, 3),
        ledger=str(folder / LEDGER_FILE),
        clips=str(folder / CLIPS_FILE),
    )
    assert summary.rows_in == summary.ok + summary.failed, f"rows lost: {summary}"
    with disk_errors(folder / SUMMARY_FILE):
        write_json(folder / SUMMARY_FILE, dataclasses.asdict(summary))
    return summary


def _clips(config: DownloadConfig, ended: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as clips to decode (CLIPS_SCHEMA), each file and window once, what failed with its reason."""
    seen: set[str] = set()
    for row in ended:
        uri = str((config.media_root / row["path"]).absolute()) if row["path"] else f"{row['source']}: {row['row_id']}"
        clip = clip_row("video", uri, start_s=row["start_s"], end_s=row["end_s"])
        if row["status"] == FAILED:
            clip |= {name: row[name] for name in ("status", "error_class", "error")} | {"etag": "", "size_bytes": None}
        if clip["clip_id"] not in seen:
            seen.add(clip["clip_id"])
            yield clip
