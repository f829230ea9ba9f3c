"""A folder of shards: decoded clips, memory-mapped, found again after they have moved. Knows no windows, Ray or torch.

    shard-*.arrow     decoded clips (schema.SHARD_SCHEMA), Arrow IPC file, uncompressed
    merged-*.arrow    many of them in one (compact.py); one that moved.json does not name does not exist
    moved.json        {old shard: [new shard, first row]}: where the rows of shards that are gone lie now
    features-*/       tower features of the same rows, where they were asked for (feature_store.py)
Whoever holds the name of a shard and a row finds the frames for ever: rows never leave their order when shards merge.
Legend: T frames, S crop side.
"""

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.errors import DataError

MOVED_FILE = "moved.json"
SHARD_PATTERN, MERGED_PATTERN = "shard-*.arrow", "merged-*.arrow"
OPEN_SHARDS = 64
"""How many shards a reader keeps mapped; a view keeps its own map alive, so evicting one is always safe."""

Row = TypeVar("Row")

_Frames = tuple[tuple[int, int, int, int], pa.Buffer]
"""Shape [T, S, S, 3] and bytes of a clip, the bytes still on disk."""


class MappedRows(Generic[Row]):
    """Rows of a folder's files by (shard, row), wherever compaction has put them. Thread-safe; one in each process."""

    def __init__(self, directory: Path, open_file: Callable[[Path], Sequence[Row]], *, shards_dir: Path) -> None:
        """Set up to read.

        Args:
            directory: folder of files that have the names and the rows of the shards in `shards_dir`, or these.
            open_file: maps one file; raises DataError where it is missing or damaged.
            shards_dir: where moved.json lies.
        """
        self._directory = directory
        self._shards_dir = shards_dir
        self._open_file = open_file
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Sequence[Row]] = OrderedDict()
        self._moved: dict[str, tuple[str, int]] = {}

    def get(self, shard: str, row: int) -> Row:
        """One row; raises DataError if its file is missing or damaged."""
        with self._lock:
            name, first_row = self._place(shard)
            try:
                rows = self._rows(name)
            except DataError:
                # Compaction may have removed it just now.
                self._moved = read_moved(self._shards_dir)
                if self._moved.get(shard, (name, 0))[0] == name:
                    raise
                name, first_row = self._moved[shard]
                rows = self._rows(name)
        return rows[first_row + row]

    def has(self, shard: str) -> bool:
        """Whether a file holds the rows of `shard`."""
        with self._lock:
            name = self._place(shard)[0]
            return name in self._open or (self._directory / name).exists()

    def _place(self, shard: str) -> tuple[str, int]:
        """Where the rows of `shard` lie now: a file, and the number of the first of them there."""
        if shard in self._open:
            return shard, 0
        place = self._moved.get(shard)
        if place is not None and place[0] in self._open:
            return place
        if (self._directory / shard).exists():
            return shard, 0
        self._moved = read_moved(self._shards_dir)
        return self._moved.get(shard, (shard, 0))

    def _rows(self, name: str) -> Sequence[Row]:
        if name not in self._open:
            self._open[name] = self._open_file(self._directory / name)
        self._open.move_to_end(name)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[name]


class FrameStore:
    """Reads frames by (shard, row). Thread-safe; open one in each process."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._rows = MappedRows(self.directory, _map_frames, shards_dir=self.directory)

    def frames(self, shard: str, row: int) -> npt.NDArray[np.uint8]:
        """Frames of one decoded clip: uint8 [T, S, S, 3], a read-only view into the mapped shard.

        Raises:
            DataError: the shard is missing or damaged.
        """
        shape, data = self._rows.get(shard, row)
        return np.frombuffer(data, np.uint8).reshape(shape)


def shard_paths(directory: Path) -> list[Path]:
    """Every shard of a folder that holds its rows alone, by name."""
    moved = read_moved(directory)
    merged = {new for new, _ in moved.values()} - moved.keys()
    names = {path.name for path in directory.glob(SHARD_PATTERN)} - moved.keys() | merged
    return [directory / name for name in sorted(names)]


def read_moved(directory: Path) -> dict[str, tuple[str, int]]:
    """Old shard → (new shard, row of its first clip there); empty where nothing has moved."""
    path = directory / MOVED_FILE
    if not path.exists():
        return {}
    return {old: (new, first_row) for old, (new, first_row) in read_json(path).items()}


def read_fingerprint(path: Path) -> str:
    """What a shard was made with."""
    return _fingerprint(map_table(path))


def read_shard_records(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The fingerprint of a shard and its rows without frames (they stay unread on disk)."""
    table = map_table(path)
    return _fingerprint(table), table.drop_columns(["frames", "pts_seconds"]).to_pylist()


def _fingerprint(table: pa.Table) -> str:
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    return metadata.get(b"fingerprint", b"").decode()


def map_table(path: Path) -> pa.Table:
    """An Arrow IPC file, memory-mapped. Raises DataError if it is missing or damaged."""
    try:
        with pa.memory_map(str(path), "r") as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot map {path}: {reason}; delete the store and run the pipeline again") from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of a store. Raises DataError if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; delete the store and run the pipeline again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold one JSON object, got {type(values).__name__}; delete the store")
    return values


def binary_views(column: pa.ChunkedArray) -> list[pa.Buffer]:
    """The values of a large_binary column of a mapped file, not read yet."""
    views = []
    for chunk in column.chunks:
        # Taking the value as a scalar would copy it, so the offsets are read here.
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        views += [data.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]
    return views


def _map_frames(path: Path) -> list[_Frames]:
    table = map_table(path)
    sizes = (table[name].to_pylist() for name in ("num_frames", "height", "width"))
    shapes = [(t, h, w, 3) for t, h, w in zip(*sizes, strict=True)]
    return list(zip(shapes, binary_views(table["frames"]), strict=True))
