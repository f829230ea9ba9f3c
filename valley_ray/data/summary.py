"""What a prepared folder holds, in numbers. Knows the tables."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.data.digests import num_repeated_contents
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
COUNTED = pa.schema([CLIPS_SCHEMA.field(name) for name in ("clip_id", "status", "error_class", "shard", "row")])
"""Columns of the ledger that are counted."""


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """What a folder holds. Rows are clips: `rows_in` = `ok` + `failed` always."""

    rows_in: int
    ok: int
    failed: int
    duplicates: int
    """Rows with the bytes and the window of an earlier row; they are in ok or failed too."""
    repeated_rows: int
    """Rows of the ledger that name a clip, or a place in a shard, a second time: 0 unless something is broken."""
    by_error_class: dict[str, int]
    """Failed clips by class."""
    samples_in: int
    samples_ok: int
    """Samples that can be trained on: all of their clips are ok, and their text too where a model was given."""
    samples_failed: int
    samples_by_error_class: dict[str, int]
    clips_decoded: int
    """Clips that this run decoded or tried to; the others were there."""
    features_dir: str | None
    """Features of the model's tower, in the folder of the shards; None where none were asked for."""
    features_ok: int
    features_failed: int
    """Clips without features: what failed before or in the tower. All clips are in one of the two."""
    features_made: int
    """Features that this run made; the others were there."""
    windows_dir: str | None
    """Store for training (`data.windows_dir` in mode shards), relative to the folder; None without a model."""
    num_windows: int
    seconds: float

    def text(self, output: Path) -> str:
        """The lines that a user reads; `output` is the folder."""
        classes = ", ".join(f"{name} {count}" for name, count in self.by_error_class.items())
        made = f"{self.features_made:,} made in this run"
        features = f"features {self.features_ok:,} ok, {self.features_failed:,} failed; {made}\n"
        train = f"train    data.mode=shards data.windows_dir={output / self.windows_dir}\n" if self.windows_dir else ""
        return (
            f"clips    {self.rows_in:,}: {self.ok:,} ok, {self.failed:,} failed{f' ({classes})' if classes else ''}\n"
            f"         {self.duplicates:,} with the content of another; {self.clips_decoded:,} decoded in this run\n"
            f"{features if self.features_dir else ''}"
            f"samples  {self.samples_in:,}: {self.samples_ok:,} ok, {self.samples_failed:,} failed\n{train}"
            f"summary  {output / SUMMARY_FILE}\nreport   {output / REPORT_FILE}"
        )


def counts_by_status(table: pa.Table) -> dict[str, Any]:
    """in, ok, failed and by_error_class of clips or samples."""
    failed = table.filter(pc.equal(table["status"], FAILED))
    classes = collections.Counter(failed["error_class"].to_pylist())
    return {
        "in": table.num_rows,
        "ok": pc.sum(pc.equal(table["status"], OK)).as_py() or 0,
        "failed": failed.num_rows,
        "by_error_class": dict(classes.most_common()),
    }


def counts_of_clips(clips: pa.Table, written: pa.Table) -> dict[str, Any]:
    """Counts of the ledger; `written` is what can be read back of it (COUNTED)."""
    counts = counts_by_status(written)
    placed = written.filter(pc.is_valid(written["shard"]))
    shards = pc.index_in(placed["shard"], value_set=pc.unique(placed["shard"])).to_numpy().astype(np.int64)
    num_places = len(np.unique(shards << 32 | placed["row"].to_numpy()))
    num_repeated = (written.num_rows - pc.count_distinct(written["clip_id"]).as_py(), placed.num_rows - num_places)
    return {
        "rows_in": counts.pop("in"),
        **counts,
        "duplicates": num_repeated_contents(clips),
        "repeated_rows": max(num_repeated),
    }
