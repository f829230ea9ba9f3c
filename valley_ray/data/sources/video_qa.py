"""MSVD-QA and MSRVTT-QA: ``[{"question", "answer", "video_id", "id", ...}, ...]``, one short answer each.

MSRVTT-QA's video 7010 is the file video7010.mp4. MSVD-QA counts its videos too; the file `youtube_mapping.txt` of MSVD
tells which clip a number is (`<clip name> vid<number>` per line), without it the file is looked for as vid<number>.
Both sets are also passed on with a file name in `video`, `video_name` or `video_id` itself.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from valley_ray.data.sources.files import beside, exists, is_web, join, read_lines, shown
from valley_ray.data.sources.json_text import read_json_list
from valley_ray.data.sources.media import make_row, not_found
from valley_ray.data.sources.rows import CatalogRow, Source, failed, id_text, question_row
from valley_ray.errors import DataError, ValleyError

ID_MAP = "youtube_mapping.txt"
VIDEO_KEYS = ("video", "video_name", "video_id")
_ENDINGS = (".mp4", ".avi", ".webm", ".mkv")
_FOLDERS = ("", "videos", "video", "YouTubeClips", "TrainValVideo", "TestVideo")
"""Below the media root: where the sets' own archives put their files."""


def read_msrvtt_qa(source: Source) -> Iterator[CatalogRow]:
    """A row per question; raises DataError as `read_json_list` does."""
    yield from _read(source, lambda number: f"video{number}")


def read_msvd_qa(source: Source) -> Iterator[CatalogRow]:
    """A row per question; raises DataError as `read_json_list` does, and where a line of the id map is none."""
    path = source.companion or beside(source.path, ID_MAP)
    is_there = source.companion is not None or (not is_web(path) and exists(path))
    names = dict(_read_map(path)) if is_there else {}
    yield from _read(source, lambda number: names.get(f"vid{number}", f"vid{number}"))


def video_finder(source: Source) -> Callable[[tuple[str, ...]], dict[str, Any]]:
    """`_video_row` of file names, which remembers its last answers: questions on one video follow each other."""
    return functools.lru_cache(maxsize=4096)(functools.partial(_video_row, source))


def _video_row(source: Source, stems: tuple[str, ...]) -> dict[str, Any]:
    """The clip row of the first of the file names that is there, in any usual folder and with any usual ending."""
    names = [
        stem + ending
        for stem in stems
        for ending in (("",) if PurePosixPath(stem).suffix.lower() in _ENDINGS else (*_ENDINGS, ""))
    ]
    folders = [join(source.media.root, folder) if folder else source.media.root for folder in _FOLDERS]
    found = source.media.first(join(folder, name) for folder in folders for name in names)
    if found is None:
        error = f"{not_found(stems[0], [join(folders[0], name) for name in names if name])}, its subfolders included"
        return make_row("video", join(folders[0], names[0]), [], error=error)
    return make_row("video", found.uri, [found])


def _read(source: Source, name_of: Callable[[str], str]) -> Iterator[CatalogRow]:
    find = video_finder(source)
    for row, record in enumerate(read_json_list(source.path)):
        sample_id = source.default_id(row)
        try:
            if not isinstance(record, dict):
                raise DataError(f"a record must be an object with a question, got {type(record).__name__}")
            sample_id = id_text(record["id"]) if record.get("id") is not None else sample_id
            clip = find((_video_of(record, name_of),))
        except ValleyError as error:
            yield failed(sample_id, source.name, error)
            continue
        yield question_row(
            record.get("question"),
            record.get("answer"),
            sample_id=sample_id,
            source=source.name,
            clip=clip,
        )


def _video_of(record: Mapping[str, Any], name_of: Callable[[str], str]) -> str:
    """File name, with or without ending, that a record asks about."""
    key = next((key for key in VIDEO_KEYS if record.get(key) is not None), VIDEO_KEYS[-1])
    text = id_text(record.get(key), key)
    return name_of(text) if text.isdecimal() else text


def _read_map(path: str) -> Iterator[tuple[str, str]]:
    """(number as `vid<number>`, clip name) of every line."""
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) == 2:
            yield words[1], words[0]
        elif words:
            raise DataError(f"line {number} of {shown(path)} must read '<clip name> vid<number>', got {line!r:.80}")
