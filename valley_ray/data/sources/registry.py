"""Formats by name, and which of them a path holds. Looks at endings and first records, and reads no further."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from valley_ray.data.sources.activitynet_qa import read_activitynet_qa
from valley_ray.data.sources.config import FormatName, SourceConfig
from valley_ray.data.sources.files import ending, exists, is_folder, is_web, last_part, normalized, parent, shown
from valley_ray.data.sources.folder import read_folder
from valley_ray.data.sources.json_text import read_json_list
from valley_ray.data.sources.llava import read_conversations
from valley_ray.data.sources.media import Media, is_media
from valley_ray.data.sources.rows import CatalogRow, Source
from valley_ray.data.sources.table import READERS as TABLES
from valley_ray.data.sources.table import read_table
from valley_ray.data.sources.valley_instruct import has_video_id
from valley_ray.data.sources.vatex import QUESTIONS, read_vatex
from valley_ray.data.sources.video_qa import VIDEO_KEYS, read_msrvtt_qa, read_msvd_qa
from valley_ray.data.sources.videochat import QA_KEY, is_videochat
from valley_ray.errors import DataError

READERS: Mapping[FormatName, Callable[[Source], Iterator[CatalogRow]]] = {
    "llava": read_conversations,
    "videochat": read_conversations,
    "valley-instruct": read_conversations,
    "vatex": read_vatex,
    "msvd-qa": read_msvd_qa,
    "msrvtt-qa": read_msrvtt_qa,
    "activitynet-qa": read_activitynet_qa,
    "folder": read_folder,
    "table": read_table,
}

_LOOKED_AT = 32
"""Records at the beginning of a list of which one must be whole enough to tell the format."""


def open_source(config: SourceConfig, *, name: str | None = None) -> tuple[FormatName, Iterator[CatalogRow]]:
    """The format of a source and its rows, in the order of the file; rows are read as they are taken.

    Args:
        name: what the samples carry as their source; None: what the configuration says.

    Raises:
        DataError: there is no such path, its format cannot be told, or its media root cannot be listed. While rows are
            taken: the file is damaged. A bad record in a good file is a failed row instead.
    """
    path = normalized(config.path)
    format_name = detect(path) if config.format == "auto" else config.format
    root = config.media_root or (path if is_folder(path) else parent(path))
    media = Media(root)
    media.check()
    companion = None if config.companion is None else normalized(config.companion)
    source = Source(path, name or config.name or last_part(path), media, companion)
    return format_name, READERS[format_name](source)


def check_source(config: SourceConfig) -> None:
    """Raise DataError where `open_source` would, or the taking of the first row."""
    path = normalized(config.path)
    if config.format != "auto" and not is_web(path) and not exists(path):
        raise _missing(path)
    next(open_source(config)[1], None)
    if config.companion is not None and not is_web(config.companion) and not exists(normalized(config.companion)):
        raise _missing(normalized(config.companion))


def detect(path: str) -> FormatName:
    """The format of what lies at `path`.

    Raises:
        DataError: nothing is there, or no format fits; says what was seen and which formats there are.
    """
    if not is_web(path) and not exists(path):
        raise _missing(path)
    if is_folder(path) or is_media(path):
        return "folder"
    if ending(path) in TABLES:
        return "table"
    if ending(path) == ".json" or _begins_like_a_list(path):
        return _detect_list(path)
    raise _unknown(path, f"the ending {ending(path) or 'none'} and no JSON list")


def _missing(path: str) -> DataError:
    return DataError(f"cannot read records {shown(path)}: there is no such file or folder; check the path")


def _begins_like_a_list(path: str) -> bool:
    try:
        next(read_json_list(path), None)
    except DataError:
        return False
    return True


def _detect_list(path: str) -> FormatName:
    records = list(itertools.islice(read_json_list(path), _LOOKED_AT))
    if not records:
        return "llava"
    for record in records:
        fitting = _fitting(record, path) if isinstance(record, dict) else []
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise _unknown(path, f"records that fit {' and '.join(fitting)}")
    first = next((record for record in records if isinstance(record, dict)), None)
    seen = f"records of {type(records[0]).__name__}" if first is None else f"the keys {', '.join(first)[:200]}"
    raise _unknown(path, seen)


def _fitting(record: Mapping[str, Any], path: str) -> list[FormatName]:
    if QA_KEY in record or "conversations" in record:
        if has_video_id(record):
            return ["valley-instruct"]
        return ["videochat" if is_videochat(record) else "llava"]
    if "videoID" in record and (any(key in record for key in QUESTIONS) or len(record) == 1):
        return ["vatex"]
    if "question_id" in record and "video_name" in record:
        return ["activitynet-qa"]
    if "question" in record and "answer" in record and any(key in record for key in VIDEO_KEYS):
        return _question_sets(record, path)
    return []


def _question_sets(record: Mapping[str, Any], path: str) -> list[FormatName]:
    """MSRVTT-QA alone has categories; else the path has to say which set it is; its last parts count more."""
    if "category_id" in record:
        return ["msrvtt-qa"]
    for part in reversed(path.lower().replace("-", "").replace("_", "").split("/")):
        if ("msvd" in part) != ("msrvtt" in part):
            return ["msvd-qa" if "msvd" in part else "msrvtt-qa"]
    return ["msvd-qa", "msrvtt-qa"]


def _unknown(path: str, seen: str) -> DataError:
    return DataError(f"{shown(path)}: its format cannot be told from {seen}; give format=, one of {', '.join(READERS)}")
