"""Which window needs what, and what an earlier run has already done. Knows the tables and the store; no Ray.

The order of the samples is cut into windows of equal size. A clip belongs to the first window that shows it; later
windows point to its row. Outcomes of clips come from three places: committed windows, whole shards that a run left
behind before it was interrupted, and decoding.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.data.commit import write_json
from valley_ray.data.schema import CLIPS_SCHEMA
from valley_ray.data.shards import STORE_FILE, StoreInfo, WindowStore, read_shard_records
from valley_ray.data.stages import BLOCK_SCHEMA, OUTCOME_SCHEMA
from valley_ray.errors import DataError

Outcome = dict[str, Any]
"""One row of OUTCOME_SCHEMA."""


@dataclasses.dataclass(frozen=True)
class PlannedWindow:
    """One window before its work: rows of the samples table in order, rows of the clips table first needed here."""

    index: int
    first_position: int
    samples: npt.NDArray[np.int64]
    clips: npt.NDArray[np.int64]


def plan_windows(
    clips: pa.Table, samples: pa.Table, order: npt.NDArray[np.int64], window_size: int
) -> list[PlannedWindow]:
    """Cut `order` (int64 [N], rows of the samples table) into windows; a clip goes to the first that shows it."""
    row_of = {clip_id: row for row, clip_id in enumerate(clips["clip_id"].to_pylist())}
    clip_ids = samples["clip_ids"].to_pylist()
    seen: set[int] = set()
    windows = []
    for index, first in enumerate(range(0, len(order), window_size)):
        rows = order[first : first + window_size]
        shown = dict.fromkeys(row_of[clip_id] for row in rows.tolist() for clip_id in clip_ids[row])
        new = [row for row in shown if row not in seen]
        seen.update(new)
        windows.append(PlannedWindow(index, first, rows, np.array(new, np.int64)))
    return windows


def blocks_of(
    window: PlannedWindow, clips: pa.Table, done: Mapping[str, Outcome], block_size: int
) -> Iterator[pa.Table]:
    """The clips of `window` that are still to be decoded, as tables of BLOCK_SCHEMA with at most `block_size` rows."""
    columns = [name for name in BLOCK_SCHEMA.names if name not in ("window", "block")]
    rows = [row for row in clips.select(columns).take(window.clips).to_pylist() if row["clip_id"] not in done]
    for block, first in enumerate(range(0, len(rows), block_size)):
        part = [{"window": window.index, "block": block, **row} for row in rows[first : first + block_size]]
        yield pa.Table.from_pylist(part, schema=BLOCK_SCHEMA)


def check_order(order: Sequence[int] | npt.NDArray[np.int64], num_samples: int) -> npt.NDArray[np.int64]:
    """`order` as int64 [num_samples]; raises DataError unless it names every sample once."""
    rows = np.asarray(order, dtype=np.int64)
    if rows.shape != (num_samples,) or not np.array_equal(np.sort(rows), np.arange(num_samples)):
        raise DataError(
            f"order must name each of the {num_samples} samples once, got {rows.size} numbers, {len(np.unique(rows))} "
            "of them different; draw it for this number of samples"
        )
    return rows


def records_digest(clips: pa.Table, samples: pa.Table) -> str:
    """Hex digest of what the two tables ask for: texts, files with their size and mtime, windows."""
    digest = hashlib.blake2b(digest_size=16)
    for table, names in (
        (clips, ["clip_id", "kind", "uri", "start_s", "end_s", "size_bytes", "etag"]),
        (samples, ["sample_id", "clip_ids", "conversation", "status"]),
    ):
        for batch in table.select(names).to_batches(max_chunksize=1024):
            digest.update(json.dumps(batch.to_pylist()).encode())
    return digest.hexdigest()


def open_store(directory: Path, info: StoreInfo) -> WindowStore:
    """Begin the store at `directory`, or go on with one that was made of the same things.

    Raises:
        DataError: the folder holds a store that was made of something else; the message names what differs.
    """
    store = WindowStore(directory)
    found = store.info()
    if found is None:
        if any(directory.glob("window-*")):
            raise DataError(f"windows_dir {directory} holds windows without {STORE_FILE}; delete it or choose another")
        write_json(directory / STORE_FILE, dataclasses.asdict(info))
    elif found.fingerprint != info.fingerprint:
        names = [name for name in info.parts if found.parts.get(name) != info.parts[name]]
        raise DataError(
            f"windows_dir {directory} holds windows made with another {', '.join(names) or 'version'}; "
            "delete that folder or choose another windows_dir"
        )
    return store


def fingerprint(parts: Mapping[str, str]) -> str:
    """Hex digest of the named parts."""
    return hashlib.blake2b(json.dumps(dict(parts), sort_keys=True).encode(), digest_size=16).hexdigest()


def known_outcomes(store: WindowStore, clips: pa.Table, fingerprint: str) -> dict[str, Outcome]:
    """Outcomes by clip_id that earlier runs left in the store; files of theirs that hold none are removed."""
    known: dict[str, Outcome] = {}
    for manifest in store.committed():
        known.update((row["clip_id"], row) for row in store.clips(manifest).select(OUTCOME_SCHEMA.names).to_pylist())
    used = {outcome["shard"] for outcome in known.values()}
    etags = dict(zip(clips["clip_id"].to_pylist(), clips["etag"].to_pylist(), strict=True))
    for path in sorted(store.directory.glob("shard-*.arrow")):
        if path.name in used:
            continue
        made_with, records = read_shard_records(path)
        fresh = [
            {name: record[name] for name in OUTCOME_SCHEMA.names if name in record}
            | {"shard": path.name, "row": row, "width": record["source_width"], "height": record["source_height"]}
            for row, record in enumerate(records)
            if record["clip_id"] not in known and etags.get(record["clip_id"]) == record["etag"]
        ]
        if made_with != fingerprint or not fresh:
            path.unlink()
        else:
            known.update((outcome["clip_id"], outcome) for outcome in fresh)
    for path in store.directory.glob(".*.tmp"):
        path.unlink()
    return known


def ledger(window: PlannedWindow, clips: pa.Table, outcomes: Mapping[str, Outcome], sampling: str) -> pa.Table:
    """The clips of `window` (CLIPS_SCHEMA) with what came of them."""
    rows = [
        row | outcomes[row["clip_id"]] | {"sampling": "image" if row["kind"] in ("image", "images") else sampling}
        for row in clips.take(window.clips).to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=CLIPS_SCHEMA)
