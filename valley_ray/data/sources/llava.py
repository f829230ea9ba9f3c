"""Lists of conversations: LLaVA-CC3M-595K, LLaVA-instruct-150K, Valley-webvid2M-703K, VideoChat, Valley-Instruct.

A JSON list of ``{"id", "image" | "video", "conversations": [{"from", "value"}], "source"}``. Files of several families
put together are common (the original trains on such), so each record is read as what it is: with the id of a video as
Valley-Instruct's, with `QA` or without an id of its own as VideoChat's.
"""

import functools
from collections.abc import Iterator
from typing import Any

from valley_ray.data.sources.json_text import read_json_list
from valley_ray.data.sources.rows import CatalogRow, Source, sample_of
from valley_ray.data.sources.valley_instruct import has_video_id, video_id_of, windowed_clip
from valley_ray.data.sources.videochat import is_videochat, videochat_row


def read_conversations(source: Source) -> Iterator[CatalogRow]:
    """The rows of a JSON list of conversations; raises DataError as `read_json_list` does."""
    for row, record in enumerate(read_json_list(source.path)):
        yield conversation_row(record, row, source)


def conversation_row(record: Any, row: int, source: Source) -> CatalogRow:
    """The row of one record of any of the families, which is number `row` of its file."""
    fallback_id = source.default_id(row)
    locate, default_id = source.media.clip, None
    if isinstance(record, dict):
        if is_videochat(record) and not has_video_id(record):
            return videochat_row(record, fallback_id=fallback_id, source=source)
        if has_video_id(record):
            locate = functools.partial(windowed_clip, source.media)
            default_id = fallback_id
            record = _with_video(record)
    return sample_of(record, default_id=default_id, fallback_id=fallback_id, source=source.name, locate=locate)


def _with_video(record: dict[str, Any]) -> dict[str, Any]:
    """Valley-Instruct names a file in `video`; where that is missing, its id stands for it."""
    if record.get("video") is not None or record.get("image") is not None:
        return record
    return record | {"video": str(video_id_of(record)[1])}
