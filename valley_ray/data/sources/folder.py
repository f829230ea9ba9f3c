"""A plain folder of media: every file with a media ending is a clip, empty ones included; nobody talks about them.

Subfolders are gone through as well, all in the order of their names; hidden files and folders are left out. A
subfolder of nothing but numbered images (frame_0001.png, frame_0002.png, ...) is one clip, a folder of frames.
"""

import os
import re
from collections.abc import Iterator, Sequence

from valley_ray.data.sources.files import ending, is_folder, is_url, is_web, join, list_folder, reading, shown
from valley_ray.data.sources.media import VIDEO_ENDINGS, encodable, failed_clip, is_media, make_row, printable
from valley_ray.data.sources.rows import CatalogRow, Source
from valley_ray.errors import DataError
from valley_ray.media.source import IMAGE_SUFFIXES

_NUMBERED = re.compile(r"(.*?)\d+")


def read_folder(source: Source) -> Iterator[CatalogRow]:
    """A row per clip, without samples; `path` may also be one media file.

    Raises:
        DataError: there is no such folder or file, or no media in it.
    """
    paths = _walk(source.path, set(), is_root=True) if is_folder(source.path) else iter([source.path])
    num_clips = 0
    for path in paths:
        num_clips += 1
        yield _row(path, source)
    if not num_clips:
        known = ", ".join((*VIDEO_ENDINGS, *IMAGE_SUFFIXES))
        raise DataError(f"{shown(source.path)}: no file in it ends in {known}; records are named by their own file")


def _row(path: str, source: Source) -> CatalogRow:
    try:
        encodable(path, "path")
    except DataError:
        reason = DataError(f"{printable(path)}: its name is not UTF-8, which no table holds; rename it")
        return CatalogRow(None, (failed_clip(path, reason),))
    kind = "image" if ending(path) in IMAGE_SUFFIXES else "video"
    found = source.media.find(path) if not is_web(path) else None
    return CatalogRow(None, (make_row(kind, path if found is None else found.uri, [found] if found else []),))


def _walk(folder: str, seen: set[tuple[int, int]], *, is_root: bool = False) -> Iterator[str]:
    """Media files below a folder, and folders of frames; a folder that links lead back to is entered once."""
    if not is_url(folder):
        with reading(folder):
            status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
    files, folders = _entries(folder)
    if not is_root and not folders and _are_frames(files):
        yield folder
        return
    for name in sorted([*files, *folders]):
        if name in folders:
            yield from _walk(join(folder, name), seen)
        else:
            yield join(folder, name)


def _entries(folder: str) -> tuple[list[str], set[str]]:
    """Names of the media files and of the subfolders."""
    entries = [(name, is_dir) for name, is_dir in list_folder(folder) if not name.startswith(".")]
    files = [name for name, is_dir in entries if not is_dir and is_media(name)]
    return files, {name for name, is_dir in entries if is_dir}


def _are_frames(files: Sequence[str]) -> bool:
    """Whether files are images that share a name but for their number."""
    stems = [_NUMBERED.fullmatch(os.path.splitext(name)[0]) for name in files]
    return (
        len(files) > 1
        and all(ending(name) in IMAGE_SUFFIXES for name in files)
        and len({match[1] if match else name for match, name in zip(stems, files, strict=True)}) == 1
    )
