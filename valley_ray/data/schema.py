"""The tables of the data platform: columns, statuses and the checks that hold between them. Knows no Ray and no torch.

Four tables, in the order in which a row lives through them:
    clips      one row per piece of media: what to decode, then what came of it (Parquet, one ledger per window)
    samples    one row per conversation: which clips it shows, in the order of its visual marks
    shard      one row per decoded clip: its frames, or the reason why there are none
    window     one row per tokenized sample: token ids and where its frames lie
A row is never dropped: what failed keeps its row, with a status, a class and a sentence.
"""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.errors import DataError

PENDING = "pending"
OK = "ok"
FAILED = "failed"
STATUSES = (PENDING, OK, FAILED)
KINDS = ("video", "image", "frames", "images")
"""frames: a folder of frame images. images: several image files as the frames of one clip; its uri is a JSON list."""

CLIPS_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("sampling", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("num_frames", pa.int32()),
        ("content_digest", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""clips. start_s/end_s: window in seconds, null for the whole clip. etag: identity of the bytes (mtime for files); a
shard is keyed by (uri, etag, size_bytes, window, sampling, decoder version). shard/row: where its row lies. error of
a pending clip: the places where its file was looked for in vain when the records were read. duration_s, fps, width and
height are the file's own, as its container says, and null where it does not or was not opened."""

TURN_TYPE = pa.struct([("role", pa.string()), ("content", pa.string()), ("speaker", pa.string())])

SAMPLES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("clip_ids", pa.list_(pa.string())),
        ("conversation", pa.list_(TURN_TYPE)),
        ("source", pa.string()),
        ("num_tokens", pa.int32()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
"""samples. conversation: turns with role system | user | assistant, speaker as the record spells it (upstream's labels
depend on that); `<video>` and `<image>` marks in user turns stand for clip_ids in order. source: the record's file.
error, beside the contract's columns: the reason."""

SHARD_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("content_digest", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("source_height", pa.int32()),
        ("source_width", pa.int32()),
        ("frames", pa.large_binary()),
        ("pts_seconds", pa.list_(pa.float64())),
    ]
)
"""shard. frames: uint8 [num_frames, height, width, 3] in C order, empty where status is failed (empty rather than null:
a shard is the whole record of one block of work, failures included, so that a restart can take it over). height and
width are those of the frames, source_height and source_width those of the file. clip_id (uri and window), etag,
size_bytes and the shard's fingerprint (sampling, crops, decoder) are what made the frames: who asks for the same takes
them from here, whatever records or order it works on."""

WINDOW_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),
        ("num_label_tokens", pa.int32()),
        ("clips", pa.list_(pa.struct([("shard", pa.string()), ("row", pa.int32())]))),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
"""window. labels: -100 where no loss is taken; num_label_tokens counts the others. Failed rows have empty lists."""


def uris_of(kind: str, uri: str) -> list[str]:
    """The files of a clip: one, or those that the uri of kind images lists."""
    return list(json.loads(uri)) if kind == "images" else [uri]


def check_clips(table: pa.Table) -> pa.Table:
    """Return `table` if it is a valid clips table.

    Raises:
        DataError: columns or types differ from CLIPS_SCHEMA, a status or kind is unknown, or a clip_id repeats.
    """
    _check_columns(table, CLIPS_SCHEMA, "clips")
    _check_values(table, "status", STATUSES, "clips")
    _check_values(table, "kind", KINDS, "clips")
    if pc.count_distinct(table["clip_id"]).as_py() != table.num_rows:
        counts = pc.value_counts(table["clip_id"]).to_pylist()
        repeated = next(entry["values"] for entry in counts if entry["counts"] > 1)
        raise DataError(f"clips table: clip_id {repeated!r} repeats; one row per clip, let samples share it")
    return table


def check_samples(table: pa.Table, clips: pa.Table) -> pa.Table:
    """Return `table` if it is a valid samples table over `clips`.

    Raises:
        DataError: columns or types differ from SAMPLES_SCHEMA, a status is unknown, or a clip_id is not in `clips`.
    """
    _check_columns(table, SAMPLES_SCHEMA, "samples")
    _check_values(table, "status", STATUSES, "samples")
    used = pc.unique(pc.list_flatten(table["clip_ids"]))
    unknown = used.filter(pc.invert(pc.is_in(used, value_set=pc.unique(clips["clip_id"]))))
    if len(unknown):
        raise DataError(f"samples table: clip_id {unknown[0].as_py()!r} is not in the clips table; add its row there")
    return table


def _check_columns(table: pa.Table, schema: pa.Schema, name: str) -> None:
    missing = [field.name for field in schema if field.name not in table.column_names]
    if missing:
        raise DataError(f"{name} table: column(s) {', '.join(missing)} missing; expected {', '.join(schema.names)}")
    for field in schema:
        came = table.schema.field(field.name).type
        if not came.equals(field.type):
            raise DataError(f"{name} table: column {field.name} must be {field.type}, got {came}")


def _check_values(table: pa.Table, column: str, allowed: Sequence[str], name: str) -> None:
    for value in pc.unique(table[column]).to_pylist():
        if value not in allowed:
            raise DataError(f"{name} table: {column}={value!r} is not one of {', '.join(allowed)}")
