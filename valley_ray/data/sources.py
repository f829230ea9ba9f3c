"""Record files → the clips and samples tables. Knows the spellings of data sets, but no decoder, tokenizer or Ray.

Read here: the LLaVA / Valley JSON list, ``[{"id", "video" | "image", "conversations": [{"from", "value"}]}, ...]``.
Each reader turns one file into the two tables; `join` puts several together. A record that cannot be used keeps its
row, with status failed and the reason.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, from_valley_record
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, PENDING, SAMPLES_SCHEMA, check_clips, check_samples
from valley_ray.errors import ConversationError, DataError, ValleyError

MEDIA_KEYS = ("image", "video")
"""Keys of a record that name media; where both are there and only one kind is marked, that one is used (upstream)."""


def read_records(path: Path, *, media_root: Path) -> tuple[pa.Table, pa.Table]:
    """Read a LLaVA / Valley JSON list into (clips, samples), in file order; media paths are relative to `media_root`.

    Samples that name the same file share one row of the clips table.

    Raises:
        DataError: the file is missing, is not JSON, or is not a list. Bad records inside it are failed rows instead.
    """
    clips: dict[str, dict[str, Any]] = {}
    samples = [
        _sample_of(record, clips, default_id=f"{path.name}#{row}", source=path.name, media_root=media_root)
        for row, record in enumerate(_read_list(path))
    ]
    return _clips_table(clips.values()), pa.Table.from_pylist(samples, schema=SAMPLES_SCHEMA)


def join(tables: Sequence[tuple[pa.Table, pa.Table]]) -> tuple[pa.Table, pa.Table]:
    """Put the (clips, samples) of several files together, a clip that several of them name once; checks the result.

    Raises:
        DataError: a table breaks its schema, or there is no sample at all.
    """
    if not tables or not sum(samples.num_rows for _, samples in tables):
        raise DataError("no record to work on: the record files are empty; give at least one file with records")
    clips = {clip["clip_id"]: clip for table, _ in tables for clip in table.to_pylist()}
    joined = check_clips(_clips_table(clips.values()))
    return joined, check_samples(pa.concat_tables([samples for _, samples in tables]), joined)


def clip_row(kind: str, uri: str, *, start_s: float | None = None, end_s: float | None = None) -> dict[str, Any]:
    """A pending row of the clips table; size and etag (mtime) are looked up where `uri` is a local path.

    The clip_id is a hash of kind, uri and window. A file that does not exist stays pending: decoding says so.
    """
    size_bytes, etag = None, ""
    path = Path(uri)
    if "://" not in uri and path.exists():
        status = path.stat()
        size_bytes, etag = status.st_size, f"mtime-{status.st_mtime_ns}"
        kind = "frames" if path.is_dir() else kind
    key = json.dumps([kind, uri, start_s, end_s])
    row = dict.fromkeys(CLIPS_SCHEMA.names) | {
        "clip_id": hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest(),
        "kind": kind,
        "uri": uri,
        "start_s": start_s,
        "end_s": end_s,
        "size_bytes": size_bytes,
        "etag": etag,
        "status": PENDING,
        "attempts": 0,
    }
    return {name: row[name] for name in CLIPS_SCHEMA.names}


def _read_list(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read records {path}: {error.strerror}; give the path of a JSON list") from error
    except ValueError as error:
        raise DataError(f"records {path} are not valid JSON ({error}); give a JSON list of records") from error
    if not isinstance(records, list):
        raise DataError(f"records {path} must be a JSON list of records, got {type(records).__name__}")
    return records


def _sample_of(
    record: Any, clips: dict[str, dict[str, Any]], *, default_id: str, source: str, media_root: Path
) -> dict[str, Any]:
    sample: dict[str, Any] = {"sample_id": default_id, "clip_ids": [], "conversation": [], "source": source}
    sample |= {"num_tokens": 0, "status": PENDING, "error_class": "", "error": ""}
    try:
        sample["sample_id"] = _id_of(record)
        conversation = from_valley_record(record)
        _check_text(conversation)
        rows = [_clip_of(kind, name, media_root) for kind, name in _media_of(record, conversation)]
    except ValleyError as error:
        return sample | {"status": FAILED, "error_class": error.code, "error": str(error)}
    clips.update((row["clip_id"], row) for row in rows)
    sample["clip_ids"] = [row["clip_id"] for row in rows]
    sample["conversation"] = [dataclasses.asdict(message) for message in conversation.messages]
    return sample


def _id_of(record: Any) -> str:
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with id and conversations, got {type(record).__name__}")
    name = record.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"a record needs an 'id' (text or number), got {name!r}")
    return _encodable(str(name), "id")


def _check_text(conversation: Conversation) -> None:
    for message in conversation.messages:
        _encodable(message.content, "conversations")
    if not any(message.role == "assistant" and message.content.strip() for message in conversation.messages):
        raise ConversationError(
            "the conversation has no answer to learn from; expected at least one gpt turn with text"
        )


def _encodable(text: str, key: str) -> str:
    """JSON can spell half a surrogate pair, which neither Arrow nor a tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"'{key}' holds text that is not valid Unicode (half a surrogate pair): {error}") from error
    return text


def _media_of(record: dict[str, Any], conversation: Conversation) -> list[tuple[str, str]]:
    """(kind, file name) for every mark, in the order of the marks."""
    media = {key: _names_of(record, key) for key in MEDIA_KEYS if record.get(key) is not None}
    marks = [
        mark.strip("<>")
        for message in conversation.messages
        if message.role == "user"
        for mark in MEDIA_MARK.findall(message.content)
    ]
    if len(media) == 1:
        # With one kind of media, upstream's records use either mark for it.
        [kind] = media
        marks = [kind] * len(marks)
    needed = {kind: marks.count(kind) for kind in MEDIA_KEYS}
    for kind in MEDIA_KEYS:
        num_named = len(media.get(kind, []))
        unused = num_named > 0 and needed[kind] == 0 and bool(marks)
        if needed[kind] != num_named and not unused:
            raise ConversationError(
                f"the conversation has {needed[kind]} <{kind}> mark(s) for {num_named} '{kind}' file(s); "
                "give one mark in a user turn for each file"
            )
    names = {kind: iter(found) for kind, found in media.items()}
    return [(kind, next(names[kind])) for kind in marks]


def _names_of(record: dict[str, Any], key: str) -> list[str]:
    value = record[key]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"'{key}' must be a file name or a list of them, got {value!r:.80}")
    return [_encodable(name, key) for name in names]


def _clip_of(kind: str, name: str, media_root: Path) -> dict[str, Any]:
    return clip_row(kind, name if "://" in name else str((media_root / name).absolute()))


def _clips_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=CLIPS_SCHEMA)
