"""Writes a store: shards and features clip by clip, windows whole, commit markers last; laid out as shards.py says."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.feature_store import FEATURES_SCHEMA
from valley_ray.data.schema import CLIPS_SCHEMA, SHARD_SCHEMA, WINDOW_SCHEMA
from valley_ray.data.shards import FAILED_FILE, LOCK_FILE, WindowManifest, window_name
from valley_ray.errors import DataError, StorageError
from valley_ray.media.frames import VideoFrames

_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT),
}


class RowWriter:
    """Writes an Arrow IPC file a row at a time, so that memory holds one clip and not a block of them.

    Use as a context manager; the file appears at `path` when the block ends without an error, else not at all. One of
    that name which has appeared meanwhile stays, and this one is dropped.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._temporary = _temporary(path)
        self._schema = schema
        self._num_rows = 0

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def write(self, row: Mapping[str, Any]) -> int:
        """Add a row, buffers for columns of large_binary; returns its number. Columns that are absent are null."""
        columns = [
            _binary_column(row[f.name]) if f.type == pa.large_binary() else pa.array([row.get(f.name)], f.type)
            for f in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._num_rows += 1
        return self._num_rows - 1

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        self._sink.close()
        if error_type is None:
            _publish(self._temporary, self._path)
        self._temporary.unlink(missing_ok=True)


class ShardWriter(RowWriter):
    """Writes one shard, clip by clip."""

    def __init__(self, directory: Path, name: str, *, fingerprint: str) -> None:
        super().__init__(directory / name, SHARD_SCHEMA.with_metadata({"fingerprint": fingerprint}))
        self.name = name

    def append(self, values: Mapping[str, Any], frames: VideoFrames | None) -> int:
        """Add a clip: `values` holds the scalar columns of SHARD_SCHEMA that are not null; returns its row number."""
        shape = frames.frames_THWC.shape if frames is not None else (0, 0, 0, 3)
        data = np.ascontiguousarray(frames.frames_THWC).data.cast("B") if frames is not None else b""
        pts = frames.pts_seconds.tolist() if frames is not None else []
        sizes = {"num_frames": shape[0], "height": shape[1], "width": shape[2]}
        return self.write({**values, **sizes, "pts_seconds": pts, "frames": data})


class FeatureWriter(RowWriter):
    """Writes the features of one shard's clips, in the order of its rows."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory / name, FEATURES_SCHEMA)

    def append(self, values: Mapping[str, Any], features: npt.NDArray[Any] | None) -> int:
        """Add a clip: `values` holds clip_id, status, error_class and error; returns its row number."""
        data = np.ascontiguousarray(features).data.cast("B") if features is not None else b""
        return self.write({**values, "shape": features.shape if features is not None else (), "features": data})


@contextlib.contextmanager
def exclusive(directory: Path, *, setting: str = "windows_dir") -> Iterator[None]:
    """Be the only writer of the store at `directory`, which is created; ends with the process at the latest.

    Args:
        setting: what the user changes to write elsewhere.

    Raises:
        DataError: another pipeline is writing there.
        StorageError: the folder cannot be made or written.
    """
    with storing(directory, setting=setting):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / LOCK_FILE).open("w")
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another pipeline is writing to {directory}; wait for its end or choose another {setting}"
            ) from error
        yield


@contextlib.contextmanager
def storing(directory: Path, *, setting: str) -> Iterator[None]:
    """Turn a full disk and missing rights into a StorageError that names `directory`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        reason = os.strerror(error.errno)
        raise StorageError(
            f"cannot write to {directory} ({reason}); make room, check its rights or choose another {setting}"
        ) from error


def commit_window(directory: Path, manifest: WindowManifest, samples: pa.Table, clips: pa.Table) -> None:
    """Write the files of a window, its marker last. `samples` has WINDOW_SCHEMA, `clips` CLIPS_SCHEMA."""
    assert samples.schema.equals(WINDOW_SCHEMA), f"want the window schema, got {samples.schema}"
    assert clips.schema.equals(CLIPS_SCHEMA), f"want the clips schema, got {clips.schema}"
    assert samples.num_rows == manifest.num_samples == manifest.num_ok + manifest.num_failed, f"rows lost: {manifest}"
    path = directory / manifest.samples_file
    temporary = _temporary(path)
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, WINDOW_SCHEMA) as writer:
        writer.write_table(samples)
    os.replace(temporary, path)
    temporary = _temporary(directory / manifest.clips_file)
    pq.write_table(clips, temporary)
    os.replace(temporary, directory / manifest.clips_file)
    write_json(directory / f"{window_name(manifest.index)}.json", dataclasses.asdict(manifest))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON under a temporary name, then rename it to `path`."""
    temporary = _temporary(path)
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def mark_failed(directory: Path, error: BaseException) -> None:
    """Leave `failed.json` for readers that wait: the producer gave up because of `error`."""
    error_class = getattr(error, "code", type(error).__name__)
    reason = " ".join(str(error).split())[:2000]
    write_json(directory / FAILED_FILE, {"error_class": error_class, "error": reason})


def clear_failure(directory: Path) -> None:
    """Remove the mark of an earlier failed run, so that nobody takes it for this run's."""
    (directory / FAILED_FILE).unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Give a whole file its name unless the name is taken: a task that Ray runs twice must leave one result."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.replace(temporary, path)


def _binary_column(data: Any) -> pa.Array:
    """One large_binary value over `data`, without copying it."""
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)])


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
