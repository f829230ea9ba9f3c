"""Many small shards become few large ones, under the eyes of their readers.

A merged shard holds the rows of its members one after the other. It is written whole, then moved.json says where each
member has gone, then the members are removed: at every moment a name and a row lead to the frames, for readers that
look them up (frame_store.py) and for those that still have the old file mapped. The members' features merge with them,
before moved.json says so. Interrupted anywhere, it is gone on with by calling it again.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from valley_ray.data.commit import exclusive, write_json
from valley_ray.data.feature_store import feature_sets
from valley_ray.data.frame_store import (
    MERGED_PATTERN,
    MOVED_FILE,
    map_table,
    read_fingerprint,
    read_moved,
    shard_paths,
)

logger = logging.getLogger(__name__)

TARGET_BYTES = 512 << 20
"""Size of a merged shard, about: a shard of half of it is left alone, so the outcome is between 256 MB and 1 GB."""


@dataclasses.dataclass(frozen=True)
class Compaction:
    """What was done."""

    num_merged: int
    """Shards that are gone."""
    num_written: int
    """Shards that hold their rows now."""


def compact(shards_dir: Path, *, target_bytes: int = TARGET_BYTES) -> Compaction:
    """Merge the small shards of a folder, alike in making and in features, in the order of their names.

    Raises:
        DataError: a pipeline is writing there, or a shard is damaged.
    """
    with exclusive(shards_dir, setting="shards_dir"):
        return compact_locked(shards_dir, target_bytes=target_bytes)


def compact_locked(shards_dir: Path, *, target_bytes: int = TARGET_BYTES) -> Compaction:
    """`compact` for whoever holds the folder's lock."""
    _remove_moved(shards_dir)
    num_merged = num_written = 0
    for group in _groups(shards_dir, target_bytes):
        names = [path.name for path in group]
        for features_dir in _features_of(shards_dir, names[0]):
            _merge(features_dir, names)
        name, first_rows = _merge(shards_dir, names)
        moved = {
            old: (name, first_rows[new] + row) if new in first_rows else (new, row)
            for old, (new, row) in read_moved(shards_dir).items()
        }
        moved |= {old: (name, first_row) for old, first_row in first_rows.items()}
        write_json(shards_dir / MOVED_FILE, moved)
        _remove_moved(shards_dir)
        num_merged, num_written = num_merged + len(group), num_written + 1
    logger.info("%d shards of %s merged into %d", num_merged, shards_dir, num_written)
    return Compaction(num_merged, num_written)


def moved_places(clips: pa.Table, shards_dir: Path) -> pa.Table:
    """A ledger (CLIPS_SCHEMA) with the present place of every row that has moved."""
    moved = read_moved(shards_dir)
    if not moved:
        return clips
    shards, rows = clips["shard"].to_pylist(), clips["row"].to_pylist()
    places = [
        (moved[shard][0], moved[shard][1] + row) if shard in moved else (shard, row)
        for shard, row in zip(shards, rows, strict=True)
    ]
    for position, name in enumerate(("shard", "row")):
        field = clips.schema.field(name)
        column = pa.array([place[position] for place in places], field.type)
        clips = clips.set_column(clips.schema.get_field_index(name), field, column)
    return clips


def _groups(shards_dir: Path, target_bytes: int) -> Iterator[list[Path]]:
    """Small shards that make one of about `target_bytes`; at least two each."""
    alike: dict[tuple[str, tuple[Path, ...]], list[Path]] = {}
    for path in shard_paths(shards_dir):
        if path.stat().st_size < target_bytes // 2:
            alike.setdefault((read_fingerprint(path), _features_of(shards_dir, path.name)), []).append(path)
    for paths in alike.values():
        yield from (group for group in _filled(paths, target_bytes) if len(group) > 1)


def _filled(paths: Sequence[Path], target_bytes: int) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for path in paths:
        if size >= target_bytes:
            yield group
            group, size = [], 0
        group.append(path)
        size += path.stat().st_size
    yield group


def _features_of(shards_dir: Path, name: str) -> tuple[Path, ...]:
    """The folders that hold features of a shard."""
    folders = (shards_dir / one.name for one in feature_sets(shards_dir))
    return tuple(folder for folder in folders if (folder / name).exists())


def _merge(directory: Path, names: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The merged file's name, and the first row of each member in it. One batch is in memory at a time."""
    key = "\n".join(names)
    path = directory / f"merged-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.arrow"
    temporary = path.with_name(f".{path.name}.tmp")
    schema = map_table(directory / names[0]).schema
    first_rows, num_rows = {}, 0
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for name in names:
            first_rows[name] = num_rows
            with pa.memory_map(str(directory / name), "r") as source:
                reader = pa.ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                    num_rows += batch.num_rows
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # its members are removed next
    os.replace(temporary, path)
    return path.name, first_rows


def _remove_moved(shards_dir: Path) -> None:
    """Remove what a merged file holds, and merged files that nothing has moved to."""
    moved = read_moved(shards_dir)
    used = {new for new, _ in moved.values()}
    for directory in (shards_dir, *(shards_dir / one.name for one in feature_sets(shards_dir))):
        for name in moved:
            (directory / name).unlink(missing_ok=True)
        for path in directory.glob(MERGED_PATTERN):
            if path.name not in used:
                path.unlink()
