"""Record files → the clips and samples tables. Knows the spellings of data sets, but no decoder, tokenizer or Ray.

Read here: the LLaVA / Valley JSON list, ``[{"id", "video" | "image", "conversations": [{"from", "value"}]}, ...]``.
Each reader turns one file into the two tables; `join` puts several together. A record that cannot be used keeps its
row, with status failed and the reason.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, from_valley_record
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, PENDING, SAMPLES_SCHEMA, check_clips, check_samples, uris_of
from valley_ray.errors import ConversationError, DataError, ValleyError

MEDIA_KEYS = ("image", "video")
"""Keys of a record that name media; where both are there and only one kind is marked, that one is used (upstream)."""

DEFAULT_FOLDER = "webvid"
"""Where upstream looks for a video whose record names no `source`."""

COCO_PREFIX = "COCO_train2014_"
"""What upstream puts before the names of images in a folder of that name."""


def read_records(path: Path, *, media_root: Path) -> tuple[pa.Table, pa.Table]:
    """Read a LLaVA / Valley JSON list into (clips, samples), in file order; media are looked for at their `places`.

    Samples that name the same file share one row of the clips table. One `<image>` mark for a list of images stands for
    all of them, as the frames of one clip (upstream); as many marks as images stand for one each.

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


def places(kind: str, name: str, record: Mapping[str, Any], media_root: Path) -> list[str]:
    """Where the file `name` of a record may lie, in the order in which it is looked for.

    A video lies in the folder that the record's `source` names, in `media_root` itself, or, without a source, in
    upstream's default folder; its name may lack `.mp4`. An image lies in `media_root`, where the names of COCO may lack
    their prefix; upstream opens a list of images from the working directory, which comes last here.

    Raises:
        DataError: `source` is there but is no text.
    """
    root = str(media_root.absolute())
    folders, names = [root], [name]
    if kind == "video":
        source = record.get("source")
        if not isinstance(source, str | None):
            raise DataError(f"'source' must be the name of a folder, got {source!r:.80}")
        named = os.path.join(root, _encodable(source, "source") if source else DEFAULT_FOLDER)
        folders = [named, root] if source else [root, named]
        names += [f"{name}.mp4"] if ".mp4" not in name else []
    elif isinstance(record.get("image"), list):
        folders.append(os.getcwd())
    elif "train2014" in root:
        names.append(COCO_PREFIX + name)
    return list(dict.fromkeys(os.path.join(folder, one) for folder in folders for one in names))


def clip_row(
    kind: str, uri: str, *, start_s: float | None = None, end_s: float | None = None, error: str = ""
) -> dict[str, Any]:
    """A pending row of the clips table; size and etag (mtime) are looked up where `uri` names local paths.

    The clip_id is a hash of kind, uri and window. A file that does not exist stays pending: decoding fails it, with
    `error` as the reason.
    """
    found = [Path(one) for one in uris_of(kind, uri) if "://" not in one and os.path.exists(one)]
    status = [path.stat() for path in found]
    etag = ",".join(str(one.st_mtime_ns) for one in status)
    if kind != "images" and found and found[0].is_dir():
        kind = "frames"
    key = json.dumps([kind, uri, start_s, end_s])
    row = dict.fromkeys(CLIPS_SCHEMA.names) | {
        "clip_id": hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest(),
        "kind": kind,
        "uri": uri,
        "start_s": start_s,
        "end_s": end_s,
        "size_bytes": sum(one.st_size for one in status) if status else None,
        "etag": f"mtime-{etag}" if status else "",
        "status": PENDING,
        "error": error,
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
        rows = [_clip_of(kind, names, record, media_root) for kind, names in _media_of(record, conversation)]
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


def _media_of(record: dict[str, Any], conversation: Conversation) -> list[tuple[str, Sequence[str]]]:
    """(kind, file names) for every mark, in the order of the marks; several names only for a group of images."""
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
    clips: dict[str, Iterator[Sequence[str]]] = {}
    for kind in MEDIA_KEYS:
        names, num_marks = media.get(kind, []), marks.count(kind)
        is_group = kind == "image" and num_marks == 1 and len(names) > 1
        is_unused = bool(names) and num_marks == 0 and bool(marks)
        if num_marks != len(names) and not is_group and not is_unused:
            raise ConversationError(
                f"the conversation has {num_marks} <{kind}> mark(s) for {len(names)} '{kind}' file(s); "
                "give one mark in a user turn for each file"
            )
        clips[kind] = iter([names] if is_group else [[name] for name in names])
    return [(kind, next(clips[kind])) for kind in marks]


def _names_of(record: dict[str, Any], key: str) -> list[str]:
    value = record[key]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"'{key}' must be a file name or a list of them, got {value!r:.80}")
    return [_encodable(name, key) for name in names]


def _clip_of(kind: str, names: Sequence[str], record: Mapping[str, Any], media_root: Path) -> dict[str, Any]:
    uris, reasons = [], []
    for name in names:
        tried = [name] if "://" in name else places(kind, name, record, media_root)
        exists = [place for place in tried if "://" in place or os.path.exists(place)]
        uris.append((exists or tried)[0])
        if not exists:
            reasons.append(f"{name}: there is no such file; looked for {' and '.join(tried)}; check media_root")
    if len(uris) == 1:
        return clip_row(kind, uris[0], error="".join(reasons))
    return clip_row("images", json.dumps(uris), error=" ".join(reasons))


def _clips_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=CLIPS_SCHEMA)
