"""Shards and windows as trainers read them, memory-mapped; commit.py writes them. Knows no Ray and no torch.

A store is one folder, and the folder of its shards (frame_store.py), which may be the same or serve many stores:
    store.json                    what the store holds: fingerprint and its parts, counts; where its shards lie
    window-00000.samples.arrow    tokenized samples in the order of the plan (schema.WINDOW_SCHEMA)
    window-00000.clips.parquet    the clips that were first needed by this window, with what came of them
    window-00000.json             the commit marker, written last: a window without it does not exist
    failed.json                   the producer gave up, with the reason
    writer.lock                   held by the one producer
Every file is written under a temporary name and renamed, so a reader never sees half a file. Windows are committed in
order, each once, and never change. Legend: T frames, S crop side, L tokens.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.frame_store import FrameStore, map_table, read_json, read_shard_records
from valley_ray.data.schema import CLIPS_SCHEMA, OK
from valley_ray.errors import DataError

__all__ = ["Sample", "StoreInfo", "Window", "WindowManifest", "WindowStore", "read_shard_records", "window_name"]

FAILED_FILE = "failed.json"
LOCK_FILE = "writer.lock"
STORE_FILE = "store.json"


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """What a store was made of; a store made of anything else is another store."""

    fingerprint: str
    parts: Mapping[str, str]
    """The named parts of the fingerprint, so that a mismatch can say which one differs."""
    num_samples: int
    window_size: int
    num_windows: int
    shards_dir: str = "."
    """Folder of the shards, relative to the store's own; it decides nothing about what the store holds."""
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Samples of each source; empty in stores made before there was such a column."""


@dataclasses.dataclass(frozen=True)
class WindowManifest:
    """One committed window. Sample j of window k is number `first_position + j` of the plan's order."""

    index: int
    first_position: int
    num_samples: int
    num_ok: int
    num_failed: int
    num_tokens: int
    num_label_tokens: int
    num_clips: int
    """Clips that this window decoded (or found undecodable) first."""
    by_error_class: Mapping[str, int]
    shards: tuple[str, ...]
    """Names of every shard that the window's samples point into."""
    fingerprint: str
    is_last: bool

    @property
    def samples_file(self) -> str:
        """Name of the tokenized samples inside the store."""
        return f"{window_name(self.index)}.samples.arrow"

    @property
    def clips_file(self) -> str:
        """Name of the clip ledger inside the store."""
        return f"{window_name(self.index)}.clips.parquet"


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One training sample. Arrays of `frames` are read-only views into the memory-mapped shard."""

    sample_id: str
    input_ids: npt.NDArray[np.int64]
    """int64 [L]"""
    labels: npt.NDArray[np.int64]
    """int64 [L], -100 where no loss is taken"""
    frames: tuple[npt.NDArray[np.uint8], ...]
    """uint8 [T, S, S, 3] per visual block, in the order of the blocks; empty for text-only samples"""
    num_label_tokens: int


def window_name(index: int) -> str:
    """Stem of the files of window `index`."""
    return f"window-{index:05d}"


class Window:
    """The samples of one committed window, memory-mapped; `window[j]` is sample j of the plan's order in it."""

    def __init__(self, manifest: WindowManifest, table: pa.Table, store: "WindowStore") -> None:
        self.manifest = manifest
        self.table = table
        self._store = store
        self.num_tokens: npt.NDArray[np.int32] = table["num_tokens"].to_numpy()
        """int32 [N]; 0 for failed samples"""
        self.num_label_tokens: npt.NDArray[np.int32] = table["num_label_tokens"].to_numpy()
        """int32 [N]; 0 for failed samples"""
        names = table["source"] if "source" in table.column_names else pa.nulls(len(self), pa.string())
        self.sources: npt.NDArray[np.object_] = np.array([name or "" for name in names.to_pylist()], object)
        """str [N]; empty in stores made before there was such a column"""
        self.is_ok: npt.NDArray[np.bool_] = np.array([status == OK for status in table["status"].to_pylist()], bool)
        """bool [N]"""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, position: int) -> Sample:
        """Sample `position` (0 ≤ position < len). Raises DataError for a failed one: ask `is_ok` first."""
        if not 0 <= position < len(self):
            raise IndexError(f"window {self.manifest.index} has {len(self)} samples, asked for {position=}")
        table = self.table
        if not self.is_ok[position]:
            reason = f"{table['error_class'][position].as_py()}: {table['error'][position].as_py()}"
            raise DataError(f"sample {position} of window {self.manifest.index} failed ({reason}); ask is_ok first")
        clips = table["clips"][position].as_py()
        return Sample(
            sample_id=table["sample_id"][position].as_py(),
            input_ids=_int64(table["input_ids"][position]),
            labels=_int64(table["labels"][position]),
            frames=tuple(self._store.frames(clip["shard"], clip["row"]) for clip in clips),
            num_label_tokens=int(self.num_label_tokens[position]),
        )

    def __iter__(self) -> Iterator[Sample]:
        """The samples that are ok, in order."""
        return (self[int(position)] for position in np.flatnonzero(self.is_ok))


class WindowStore:
    """Reads a store that a pipeline has written or is still writing. Thread-safe; open one in each process."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._manifests: list[WindowManifest] = []
        self._frames: FrameStore | None = None

    def info(self) -> StoreInfo | None:
        """What the store holds, or None while its producer has not begun. Raises DataError if it cannot be read."""
        path = self.directory / STORE_FILE
        return StoreInfo(**read_json(path)) if path.exists() else None

    @property
    def shards_dir(self) -> Path:
        """Folder of the shards that the windows point into."""
        info = self.info()
        return self.directory / (info.shards_dir if info is not None else ".")

    def failure(self) -> str | None:
        """Why the producer gave up, or None."""
        path = self.directory / FAILED_FILE
        if not path.exists():
            return None
        reason = read_json(path)
        return f"{reason['error_class']}: {reason['error']}"

    def committed(self) -> list[WindowManifest]:
        """Manifests of the windows committed so far, in order. One `stat` when nothing is new: cheap to poll."""
        with self._lock:
            while not (self._manifests and self._manifests[-1].is_last):
                path = self.directory / f"{window_name(len(self._manifests))}.json"
                if not path.exists():
                    break
                values = read_json(path)
                self._manifests.append(WindowManifest(**{**values, "shards": tuple(values["shards"])}))
            return list(self._manifests)

    def wait(
        self, index: int, *, timeout_s: float, poll_s: float = 0.1, stop: threading.Event | None = None
    ) -> WindowManifest:
        """Return the manifest of window `index`, waiting until it is committed.

        Raises:
            DataError: the store ends before `index`, its producer failed (with its reason), nothing was committed
                within `timeout_s`, or `stop` was set.
        """
        stop = stop if stop is not None else threading.Event()
        deadline = time.monotonic() + timeout_s
        while True:
            # The failure is read first: a window committed just before it must still be handed out.
            failure = self.failure()
            manifests = self.committed()
            if index < len(manifests):
                return manifests[index]
            where = f"window {index} of {self.directory}"
            if manifests and manifests[-1].is_last:
                raise DataError(f"{where} does not exist: the store ends with window {manifests[-1].index}")
            if failure is not None:
                raise DataError(f"{where} will not come, the data pipeline failed ({failure}); fix that and run again")
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DataError(
                    f"{where} was not committed within {timeout_s:g} s; is the data pipeline still running?"
                )
            if stop.wait(min(poll_s, remaining_s)):
                raise DataError(f"{where}: waiting was stopped")

    def read(self, manifest: WindowManifest) -> Window:
        """Open a committed window, memory-mapped. Raises DataError if its file is missing or damaged."""
        table = map_table(self.directory / manifest.samples_file)
        if table.num_rows != manifest.num_samples:
            raise DataError(
                f"{manifest.samples_file}: expected {manifest.num_samples} rows, got {table.num_rows}; "
                "the store is damaged, delete it and run the pipeline again"
            )
        return Window(manifest, table, self)

    def clips(self, manifest: WindowManifest) -> pa.Table:
        """The clip ledger of a window (CLIPS_SCHEMA), failures included."""
        return pq.read_table(self.directory / manifest.clips_file, schema=CLIPS_SCHEMA)

    def frames(self, shard: str, row: int) -> npt.NDArray[np.uint8]:
        """Frames of one decoded clip: uint8 [T, S, S, 3], a read-only view into the mapped shard."""
        with self._lock:
            if self._frames is None:
                self._frames = FrameStore(self.shards_dir)
        return self._frames.frames(shard, row)


def _int64(scalar: Any) -> npt.NDArray[np.int64]:
    return np.asarray(scalar.values.to_numpy(zero_copy_only=False), dtype=np.int64)
