"""Which window needs what, and what an earlier run has already done. Knows the tables and the store; no Ray.

The order of the samples is cut into windows of equal size. A clip belongs to the first window that shows it; later
windows point to its row. Outcomes of clips come from two places: shards that are there, of an interrupted run, of
another plan or of fewer clips, and decoding.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.data.commit import write_json
from valley_ray.data.frame_store import shard_paths
from valley_ray.data.journal import remove_journals
from valley_ray.data.mapped import pick
from valley_ray.data.outcomes import Outcome as Outcome
from valley_ray.data.outcomes import Outcomes
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK
from valley_ray.data.shards import STORE_FILE, StoreInfo, WindowStore
from valley_ray.data.stages import BLOCK_SCHEMA, OUTCOME_SCHEMA, outcomes_in
from valley_ray.errors import DataError
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling

logger = logging.getLogger(__name__)

LEDGER_ROWS = 1 << 14
"""Rows of a ledger that are Python objects at a time."""


@dataclasses.dataclass(frozen=True)
class PlannedWindow:
    """One window before its work: rows of the samples table in order, rows of the clips table first needed here."""

    index: int
    first_position: int
    samples: npt.NDArray[np.int64]
    clips: npt.NDArray[np.int64]


def rest_window(windows: Sequence[PlannedWindow], clips: pa.Table) -> PlannedWindow:
    """The clips that no window shows, as a window without samples after the last."""
    shown = np.concatenate([np.empty(0, np.int64), *(window.clips for window in windows)])
    rest = np.setdiff1d(np.arange(clips.num_rows), shown)
    return PlannedWindow(len(windows), sum(len(window.samples) for window in windows), np.empty(0, np.int64), rest)


def plan_windows(
    clips: pa.Table, samples: pa.Table, order: npt.NDArray[np.int64], window_size: int
) -> list[PlannedWindow]:
    """Cut `order` (int64 [N], rows of the samples table) into windows; a clip goes to the first that shows it."""
    found = pc.index_in(pc.list_flatten(samples["clip_ids"]), value_set=clips["clip_id"])
    assert not found.null_count, "samples show clips that are not in the table"
    shown = found.to_numpy().astype(np.int64)
    ends = np.cumsum(pc.fill_null(pc.list_value_length(samples["clip_ids"]), 0))
    is_seen = np.zeros(clips.num_rows, bool)
    windows = []
    for index, first in enumerate(range(0, len(order), window_size)):
        rows = order[first : first + window_size]
        parts = [shown[ends[row - 1] if row else 0 : ends[row]] for row in rows.tolist()]
        of_window = np.concatenate([np.empty(0, np.int64), *parts])
        once = of_window[np.sort(np.unique(of_window, return_index=True)[1])]
        new = once[~is_seen[once]]
        is_seen[new] = True
        windows.append(PlannedWindow(index, first, rows, new))
    return windows


def blocks_of(
    windows: Iterable[PlannedWindow], clips: pa.Table, done: Mapping[str, Outcome], size_of: Callable[[int], int]
) -> Iterator[pa.Table]:
    """The clips of `windows` that are still to be decoded, as tables of BLOCK_SCHEMA; no block spans two windows.

    Args:
        size_of: the most rows of a block, given how many rows are left from its first one to the last of all windows.
    """
    columns = [name for name in BLOCK_SCHEMA.names if name not in ("window", "block")]
    num_left = clips.num_rows - len(done)
    for window in windows:
        rows = [row for row in pick(clips.select(columns), window.clips).to_pylist() if row["clip_id"] not in done]
        block = first = 0
        while first < len(rows):
            part = rows[first : first + size_of(num_left)]
            yield pa.Table.from_pylist(
                [{"window": window.index, "block": block, **row} for row in part], schema=BLOCK_SCHEMA
            )
            block, first, num_left = block + 1, first + len(part), num_left - len(part)


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
    directory.mkdir(parents=True, exist_ok=True)
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
            f"choose another windows_dir (with shards_dir={directory / found.shards_dir} what is decoded is taken over)"
        )
    return store


def fingerprint(parts: Mapping[str, str]) -> str:
    """Hex digest of the named parts."""
    return hashlib.blake2b(json.dumps(dict(parts), sort_keys=True).encode(), digest_size=16).hexdigest()


def decode_fingerprint(sampling: FrameSampling, *, video_crop: Crop, image_crop: Crop, decoder: str) -> str:
    """Hex digest of what makes frames of files: nothing of the records, the order or the tokenizer."""
    crops = {"video_crop": video_crop.key, "image_crop": image_crop.key}
    return fingerprint({"sampling": sampling.key, "decoder": decoder, **crops})


def known_outcomes(shards_dir: Path, clips: pa.Table, fingerprint: str) -> Outcomes:
    """Outcomes by clip_id of those of `clips` that a shard under `shards_dir` holds, whoever had it made.

    Clips that their source has failed already are among them, with its reason and without a shard: they name nothing
    that could be decoded. Where several shards hold a clip, one that succeeded counts. Shards of other clips, other
    sizes or times of the same files, or with another `fingerprint` (see `decode_fingerprint`) are left alone.
    """
    wanted = {
        _key(row)
        for batch in clips.select(["clip_id", "etag", "size_bytes"]).to_batches(max_chunksize=LEDGER_ROWS)
        for row in batch.to_pylist()
    }
    failed = clips.filter(pc.equal(clips["status"], FAILED)).select(OUTCOME_SCHEMA.names).to_pylist()
    known = Outcomes((row["clip_id"], row) for row in failed)
    for path in shard_paths(shards_dir):
        try:
            made_with, outcomes = outcomes_in(path)
        except DataError as error:
            # Its clips are decoded again, into a shard that may want this name.
            logger.warning("set aside as %s.damaged: %s", path.name, error)
            path.rename(path.with_name(f"{path.name}.damaged"))
            continue
        for outcome in outcomes if made_with == fingerprint else ():
            clip_id = outcome["clip_id"]
            is_better = clip_id not in known or (known[clip_id]["status"], outcome["status"]) == (FAILED, OK)
            if is_better and _key(outcome) in wanted:
                known[clip_id] = {name: outcome[name] for name in OUTCOME_SCHEMA.names if name in outcome}
    return known


def _key(row: Mapping[str, Any]) -> bytes:
    """Digest of what a clip shows and of which bytes: smaller than the three."""
    key = json.dumps([row["clip_id"], row["etag"], row["size_bytes"]])
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that did not end by themselves left in a store; its lock must be held."""
    remove_journals(directory)
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def ledger(clips: pa.Table, outcomes: Mapping[str, Outcome], sampling: str) -> pa.Table:
    """`clips` (CLIPS_SCHEMA) with what came of them."""
    parts = [CLIPS_SCHEMA.empty_table()]
    for batch in clips.to_batches(max_chunksize=LEDGER_ROWS):
        rows = [
            row | outcomes[row["clip_id"]] | {"sampling": "image" if row["kind"] in ("image", "images") else sampling}
            for row in batch.to_pylist()
        ]
        parts.append(pa.Table.from_pylist(rows, schema=CLIPS_SCHEMA))
    return pa.concat_tables(parts)
