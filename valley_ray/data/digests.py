"""Which files hold equal bytes: digests where they can matter, and the rows that repeat an earlier one.

Only files whose size another file has are read: others cannot be equal. Bytes that were read anyway, over the net, have
their digest already. A folder of frames counts as its images, one after the other by name.
"""

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from valley_ray.data.execution import cpus_of_one_node
from valley_ray.data.schema import CLIPS_SCHEMA, uris_of
from valley_ray.media.source import frame_files

DIGEST_BYTES = 16
KNOWN = pa.schema([CLIPS_SCHEMA.field(name) for name in ("uri", "etag", "size_bytes", "content_digest")])
"""Columns of a ledger that tell what was read before."""
_BATCH_ROWS = 1 << 14
FILES_PER_TASK = 64
TASKS_AHEAD = 64
"""Tasks that are handed to Ray before the first result is waited for; on one node no more than it has CPUs."""


def with_digests(clips: pa.Table, earlier: pa.Table, *, num_cpus: float) -> pa.Table:
    """`clips` (CLIPS_SCHEMA) with content_digest where its bytes may equal another row's; needs a connected Ray.

    Args:
        earlier: a former ledger (KNOWN); what it knows of the same files is not read again.
        num_cpus: what a task that reads files reserves.
    """
    told = (row for table in (earlier, clips) for row in _rows(_with_digest(table), KNOWN))
    known = {_key(row): row["content_digest"] for row in told}
    sizes = clips.group_by("size_bytes").aggregate([("uri", "count_distinct")])
    repeated = sizes.filter(pc.greater(sizes["uri_count_distinct"], 1))["size_bytes"].drop_null()
    alike = clips.filter(pc.is_in(clips["size_bytes"], value_set=repeated))
    wanted = {_key(row): uris_of(row["kind"], row["uri"]) for row in _rows(alike, CLIPS_SCHEMA)}
    missing = [key for key in wanted if key not in known and not any("://" in uri for uri in wanted[key])]
    known.update(zip(missing, _digests([wanted[key] for key in missing], num_cpus=num_cpus), strict=True))
    if not known:
        return clips
    digests = pa.array((known.get(_key(row), "") for row in _rows(clips, KNOWN)), pa.string())
    return clips.set_column(CLIPS_SCHEMA.get_field_index("content_digest"), "content_digest", digests)


def num_repeated_contents(clips: pa.Table) -> int:
    """Rows that show the same bytes as an earlier row: one digest, one window."""
    known = _with_digest(clips)
    groups = known.group_by(["content_digest", "start_s", "end_s"]).aggregate([([], "count_all")])
    return int(known.num_rows - groups.num_rows)


def _with_digest(clips: pa.Table) -> pa.Table:
    return clips.filter(pc.not_equal(pc.fill_null(clips["content_digest"], ""), ""))


def _rows(clips: pa.Table, schema: pa.Schema) -> Generator[dict[str, Any], None, None]:
    for batch in clips.select(schema.names).to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.to_pylist()


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["uri"], row["etag"], row["size_bytes"]


def _digests(files: Sequence[Sequence[str]], *, num_cpus: float) -> list[str]:
    """A digest per entry, each of one or more files; in order, in Ray tasks."""
    read = ray.remote(num_cpus=num_cpus)(_digests_here)
    parts = (files[first : first + FILES_PER_TASK] for first in range(0, len(files), FILES_PER_TASK))
    return [digest for part in _in_order(read.remote(part) for part in parts) for digest in part]


def _in_order(results: Iterable["ray.ObjectRef[list[str]]"]) -> Generator[list[str], None, None]:
    ahead = cpus_of_one_node() or TASKS_AHEAD
    waiting: list[ray.ObjectRef[list[str]]] = []
    for result in results:
        waiting.append(result)
        if len(waiting) >= ahead:
            yield ray.get(waiting.pop(0))
    yield from ray.get(waiting)


def _digests_here(files: Sequence[Sequence[str]]) -> list[str]:
    return [_digest_of(paths) for paths in files]


def _digest_of(paths: Sequence[str]) -> str:
    """Hex digest of the files' bytes, those of a folder's images by name; empty where they cannot be read."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        for file_path in _files(paths):
            with file_path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()


def _files(paths: Sequence[str]) -> Generator[Path, None, None]:
    for path in map(Path, paths):
        if not path.is_dir() and not path.is_file():
            raise FileNotFoundError(f"{path} is neither a file nor a folder")  # a pipe would be waited for
        yield from frame_files(path) if path.is_dir() else [path]
