"""Tables of your own: CSV, JSON lines or Parquet, one row per sample.

Columns, all optional but the media: ``id``; one of ``video``, ``image`` or ``media`` (either, told by its ending): a
file name or URL, in JSON lines and Parquet also a list; ``start_s`` and ``end_s``, the window of the video in seconds;
``question`` and ``answer``, or ``conversations`` (a list of ``{"from", "value"}``, in a cell of text as JSON). Other
columns are left alone. A table without question and conversations only names clips. JSON lines of the families in
llava.py are read as those.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from valley_ray.chat.conversation import MEDIA_MARK
from valley_ray.data.sources.files import (
    ending,
    is_folder,
    join,
    list_folder,
    open_seekable,
    read_lines,
    reading,
    shown,
)
from valley_ray.data.sources.json_text import read_json_lines
from valley_ray.data.sources.llava import conversation_row
from valley_ray.data.sources.media import clip_id, failed_clip
from valley_ray.data.sources.rows import CatalogRow, Source, failed, file_names, id_text, sample_of
from valley_ray.data.sources.valley_instruct import VIDEO_ID_KEYS
from valley_ray.data.sources.videochat import QA_KEY
from valley_ray.errors import DataError, ValleyError
from valley_ray.media.source import IMAGE_SUFFIXES

COLUMNS = ("id", "video", "image", "media", "question", "answer", "conversations", "start_s", "end_s")
_MEDIA = ("video", "image", "media")
_BATCH_ROWS = 1024


def read_table(source: Source) -> Iterator[CatalogRow]:
    """A row per row of the table, or of all tables of a folder, in the order of their names.

    Raises:
        DataError: a table cannot be read, or has none of the columns.
    """
    row = 0
    for path in _tables(source.path):
        for record in READERS[ending(path)](path):
            yield _row(record, row, source)
            row += 1


def _tables(path: str) -> list[str]:
    if not is_folder(path):
        if ending(path) not in READERS:
            raise DataError(f"{shown(path)}: a table must end in {', '.join(READERS)}; rename or convert it")
        return [path]
    names = sorted(name for name, is_dir in list_folder(path) if not is_dir and not name.startswith((".", "_")))
    tables = [join(path, name) for name in names if ending(name) in READERS]
    if not tables:
        raise DataError(f"{shown(path)}: no file in it ends in {', '.join(READERS)}")
    return tables


def _csv(path: str) -> Iterator[Any]:
    reader = csv.reader(read_lines(path), delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    try:
        names = next(reader, None)
        if names is None:
            raise DataError(f"{shown(path)} is empty; expected a line of column names")
        _check_columns(names, path)
        for values in reader:
            if values:
                yield dict(zip(names, values, strict=True)) if len(values) == len(names) else _Uneven(names, values)
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {shown(path)} is not valid CSV ({error})") from error


def _parquet(path: str) -> Iterator[Any]:
    with open_seekable(path) as file, reading(path):
        table = pq.ParquetFile(file, pre_buffer=False)
        names = table.schema_arrow.names
        _check_columns(names, path)
        wanted = [name for name in names if name in (*COLUMNS, QA_KEY, "source", *VIDEO_ID_KEYS)]
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            yield from batch.to_pylist()


READERS: Mapping[str, Callable[[str], Iterator[Any]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": _parquet,
}


class _Uneven(list[str]):
    """A CSV row with another number of cells than there are columns."""

    def __init__(self, names: Sequence[str], values: Sequence[str]) -> None:
        super().__init__(values)
        self.reason = f"{len(values)} cells for {len(names)} columns; quote cells that hold commas"


def _check_columns(names: Sequence[str], path: str) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise DataError(f"{shown(path)}: column {repeated[0]!r} is there twice")
    if not set(names) & {*_MEDIA, "conversations", *VIDEO_ID_KEYS, QA_KEY}:
        came, known = ", ".join(names)[:200], ", ".join(COLUMNS)
        raise DataError(f"{shown(path)}: got the columns {came}; expected some of {known}, a file among them")


def _row(record: Any, row: int, source: Source) -> CatalogRow:
    fallback_id = source.default_id(row)
    has_words = isinstance(record, dict) and any(key in record for key in ("question", "answer", "conversations"))
    if not isinstance(record, dict) or record.get(QA_KEY) or any(record.get(key) for key in VIDEO_ID_KEYS):
        if isinstance(record, _Uneven):
            return failed(fallback_id, source.name, DataError(record.reason))
        return conversation_row(record, row, source)
    try:
        values = {key: value for key, value in record.items() if value is not None and value != ""}
        window = _window(values)
        media = _media(values)
        sample_id = id_text(values["id"]) if "id" in values else fallback_id

        def locate(kind: str, names: Sequence[str], named: Mapping[str, Any]) -> dict[str, Any]:
            return _cropped(source.media.clip(kind, names, named), window)

        if not has_words:
            if not media:
                raise DataError(f"a row needs a file in {', '.join(_MEDIA)}, got {record!r:.80}")
            clips = [locate(kind, [name], values) for kind in media for name in file_names(media, kind)]
            return CatalogRow(None, tuple(clips))
        named = media | {"id": sample_id, "conversations": _turns(values, media)}
        named |= {"source": values["source"]} if "source" in values else {}
    except ValleyError as error:
        clip = failed_clip(f"{source.name}: row {row}", error)
        return failed(fallback_id, source.name, error) if has_words else CatalogRow(None, (clip,))
    return sample_of(named, fallback_id=fallback_id, source=source.name, locate=locate)


def _media(values: Mapping[str, Any]) -> dict[str, Any]:
    media = {key: values[key] for key in ("video", "image") if key in values}
    if "media" not in values:
        return media
    if media:
        raise DataError(f"'media' beside {' and '.join(media)}: give the file in one column")
    kinds = {"image" if ending(name) in IMAGE_SUFFIXES else "video" for name in file_names(values, "media")}
    if len(kinds) > 1:
        raise DataError("'media' lists images and videos; give them in the columns image and video")
    return {kinds.pop(): values["media"]}


def _turns(values: Mapping[str, Any], media: Mapping[str, Any]) -> Any:
    turns = values.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise DataError(f"'conversations' must be a JSON list of turns ({error}), got {turns!r:.80}") from error
    if turns is not None:
        return turns
    question, answer = values.get("question"), values.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"a row needs a question and an answer, got {question!r:.60} and {answer!r:.60}")
    if not media:
        raise DataError(f"a question needs a file in {', '.join(_MEDIA)}; texts alone go into conversations")
    if not MEDIA_MARK.search(question):
        marks = "".join(f"<{kind}>\n" for kind in media for _ in file_names(media, kind))
        question = marks + question
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _window(values: Mapping[str, Any]) -> tuple[float | None, float | None]:
    start_s, end_s = (_seconds(values, key) for key in ("start_s", "end_s"))
    if end_s is not None and end_s <= (start_s or 0.0):
        raise DataError(f"the window ends at {end_s:g} s, not after its start at {start_s or 0.0:g} s")
    return start_s, end_s


def _seconds(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"'{key}' must be seconds from the start of the video, got {value!r:.80}")
    return seconds


def _cropped(row: dict[str, Any], window: tuple[float | None, float | None]) -> dict[str, Any]:
    if window == (None, None) or row["kind"] in ("image", "images"):
        return row
    return row | {"clip_id": clip_id(row["kind"], row["uri"], *window), "start_s": window[0], "end_s": window[1]}
