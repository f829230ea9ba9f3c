"""VATEX annotations: ``[{"videoID": "<YouTube id>_<start>_<end>", "enCap": [...], "chCap": [...]}, ...]``.

Every caption is a sample of its own, all on one clip; the windows are found as in Valley-Instruct. The private test
split has no captions: its clips are decoded without a sample.
"""

from collections.abc import Iterator
from typing import Any

from valley_ray.data.sources.json_text import read_json_list
from valley_ray.data.sources.rows import CatalogRow, Source, failed, question_row
from valley_ray.data.sources.valley_instruct import parse_vatex_id, windowed_clip
from valley_ray.errors import DataError, ValleyError

QUESTIONS = {"enCap": "Describe this video in one sentence.", "chCap": "用一句话描述这段视频。"}
"""What a caption answers, by the key of its language."""


def read_vatex(source: Source) -> Iterator[CatalogRow]:
    """A row per caption, or one per video without captions; raises DataError as `read_json_list` does."""
    for row, record in enumerate(read_json_list(source.path)):
        fallback_id = source.default_id(row)
        try:
            video_id, captions = _read(record)
            fallback_id = video_id
            clip = windowed_clip(source.media, "video", [video_id], record)
        except ValleyError as error:
            yield failed(fallback_id, source.name, error)
            continue
        if not captions:
            yield CatalogRow(None, (clip,))
        for key, number, caption in captions:
            yield question_row(
                QUESTIONS[key],
                caption,
                sample_id=f"{video_id}#{key[:2]}{number}",
                source=source.name,
                clip=clip,
            )


def _read(record: Any) -> tuple[str, list[tuple[str, int, Any]]]:
    """Id and captions (key, number from 1, text) of an annotation."""
    video_id = record.get("videoID") if isinstance(record, dict) else None
    if not isinstance(video_id, str):
        raise DataError(f"an annotation must be an object with a text videoID, got {record!r:.80}")
    parse_vatex_id(video_id)
    captions = []
    for key in QUESTIONS:
        texts = record.get(key) or []
        if not isinstance(texts, list):
            raise DataError(f"'{key}' must be a list of captions, got {texts!r:.80}")
        captions += [(key, number, text) for number, text in enumerate(texts, start=1)]
    return video_id, captions
