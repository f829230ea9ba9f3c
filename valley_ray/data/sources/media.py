"""Names in records → clip rows: where a file may lie, whether it is there, its size and etag. Knows no format."""

import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, PENDING, uris_of
from valley_ray.data.sources.files import (
    ending,
    filesystem_of,
    is_url,
    is_web,
    join,
    last_part,
    normalized,
    reading,
    shown,
)
from valley_ray.errors import DataError, ValleyError
from valley_ray.media.source import IMAGE_SUFFIXES

DEFAULT_FOLDER = "webvid"
"""Where upstream looks for a video whose record names no `source`."""

COCO_PREFIX = "COCO_train2014_"
"""What upstream puts before the names of images in a folder of that name."""

VIDEO_ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".ts"),
    *(".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".3gp", ".3g2", ".mxf", ".mjpeg", ".divx"),
)
"""Endings by which a folder's files count as media; a GIF is a video."""

_LISTED_NAMES = 10_000
"""Folders of more entries are not listed: there a look at the one file is cheaper than memory for all names."""
_KEPT_NAMES = 200_000
"""Names of listed folders that are kept in memory, all folders together."""
_FOLDER_COST = 10
"""Names that the memory for an empty folder would hold."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that is there."""

    uri: str
    size_bytes: int | None
    etag: str
    """Identity of its bytes: `mtime-<ns>`, `files-<digest>` for a folder of frames, or what the store gives, if any."""
    is_folder: bool = False


def is_media(name: str) -> bool:
    """Whether a file of this name counts as a video or an image."""
    return ending(name) in VIDEO_ENDINGS or ending(name) in IMAGE_SUFFIXES


def places(kind: str, name: str, record: Mapping[str, Any], media_root: Path | str) -> list[str]:
    """Where the file `name` of a record may lie, in the order in which it is looked for.

    A video lies in the folder that the record's `source` names, in `media_root` itself, or, without a source, in
    upstream's default folder; its name may lack `.mp4`. An image lies in `media_root`, where the names of COCO may lack
    their prefix; upstream opens a list of images from the working directory, which comes last here.

    Raises:
        DataError: `source` is there but is no text.
    """
    root = str(media_root) if is_url(str(media_root)) else os.path.abspath(media_root)
    folders, names = [root], [name]
    if kind == "video":
        folders = video_folders(record, root)
        names += [f"{name}.mp4"] if ".mp4" not in name else []
    elif isinstance(record.get("image"), list):
        folders.append(os.getcwd())
    elif "train2014" in root:
        names.append(COCO_PREFIX + name)
    return list(dict.fromkeys(join(folder, one) for folder in folders for one in names))


def video_folders(record: Mapping[str, Any], root: str) -> list[str]:
    """The folders that a record's videos may lie in, below the absolute `root`; raises DataError as `places` does."""
    source = record.get("source")
    if not isinstance(source, str | None) or is_url(source or ""):
        raise DataError(f"'source' must be the name of a folder, got {source!r:.80}")
    named = join(root, encodable(source, "source") if source else DEFAULT_FOLDER)
    return [named, root] if source else [root, named]


def encodable(text: str, key: str) -> str:
    """`text`, or a DataError: JSON can spell half a surrogate pair, which neither Arrow nor a tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"'{key}' holds text that is not valid Unicode (half a surrogate pair): {error}") from error
    return text


def clip_row(
    kind: str, uri: str, *, start_s: float | None = None, end_s: float | None = None, error: str = ""
) -> dict[str, Any]:
    """A pending row of the clips table; size and etag (mtime) are looked up where `uri` names local paths.

    The clip_id is a hash of kind, uri and window. A file that does not exist stays pending: decoding fails it, with
    `error` as the reason.
    """
    found = [_stat(one) for one in uris_of(kind, uri) if not is_url(one)]
    return make_row(kind, uri, [one for one in found if one], start_s=start_s, end_s=end_s, error=error)


def make_row(
    kind: str,
    uri: str,
    found: Sequence[Found],
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    error: str = "",
) -> dict[str, Any]:
    """A pending row of the clips table over files that were already looked up; see `clip_row`."""
    if kind != "images" and found and found[0].is_folder:
        kind = "frames"
    sizes = [one.size_bytes for one in found if one.size_bytes is not None]
    return _EMPTY_ROW | {
        "clip_id": clip_id(kind, uri, start_s, end_s),
        "kind": kind,
        "uri": uri,
        "start_s": start_s,
        "end_s": end_s,
        "size_bytes": sum(sizes) if sizes else None,
        "etag": _joined([one.etag for one in found]),
        "status": PENDING,
        "error": error,
        "attempts": 0,
    }


def clip_id(kind: str, uri: str, start_s: float | None, end_s: float | None) -> str:
    """Identity of a clip: what is shown, not what the file holds."""
    key = json.dumps([kind, uri, start_s, end_s])
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def failed_clip(uri: str, error: ValleyError) -> dict[str, Any]:
    """The row of media that cannot be used because of `error`; `uri` says which."""
    uri = printable(uri)
    return make_row("video", uri, [], error=printable(str(error))) | {"status": FAILED, "error_class": error.code}


def printable(text: str) -> str:
    """`text`, with escapes in place of what no table can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Media:
    """The files below a media root, looked up with few system calls.

    Folders of up to ten thousand entries are listed once, so that a name which is not there costs nothing; in larger
    ones each name costs one look. In buckets every folder is listed once; below http(s) nothing can be looked up, and
    the first place with an ending is taken on trust, as is a name that is a URL itself.
    """

    def __init__(self, root: str) -> None:
        """Raises DataError where the root's name is not valid Unicode: no table could hold the paths below it."""
        root = normalized(root)
        self.root = encodable(root if is_url(root) else os.path.abspath(root), "media_root")
        self.find = functools.lru_cache(maxsize=8192)(self._find)
        """`_find`, which remembers the last answers: records on one video often follow each other."""
        self._local: OrderedDict[str, frozenset[str] | None] = OrderedDict()
        self._num_kept = 0
        self._remote: dict[str, dict[str, Found]] = {}

    def check(self) -> None:
        """Raise DataError where the root is in a bucket that cannot be listed: no record is to blame for that."""
        if is_url(self.root) and not is_web(self.root):
            self._listed(self.root)

    def clip(self, kind: str, names: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
        """The clip row of the file `names[0]`, or of several images that are the frames of one clip.

        Raises:
            DataError: `source` of the record is no text, or a bucket cannot be listed.
        """
        looked = [self._look(kind, name, record) for name in names]
        uris = [found.uri if found else tried[0] for found, tried in looked]
        there = [found for found, _ in looked if found]
        error = " ".join(
            not_found(name, tried) for name, (found, tried) in zip(names, looked, strict=True) if found is None
        )
        if len(uris) == 1:
            return make_row(kind, uris[0], there, error=error)
        return make_row("images", json.dumps(uris), there, error=error)

    def first(self, tried: Iterable[str]) -> Found | None:
        """The first of the paths that is there."""
        tried = list(tried)
        if tried and is_web(tried[0]):
            return Found(next((one for one in tried if "." in last_part(one)), tried[0]), None, "")
        return next((found for one in tried if (found := self.find(one))), None)

    def _look(self, kind: str, name: str, record: Mapping[str, Any]) -> tuple[Found | None, list[str]]:
        if is_url(name):
            return Found(name, None, ""), [name]
        tried = places(kind, name, record, self.root)
        return self.first(tried), tried

    def _find(self, path: str) -> Found | None:
        folder, _, name = path.rpartition("/")
        if is_url(path):
            return self._listed(folder).get(name)
        names = self._names(folder or "/")
        return None if names is not None and name not in names else _stat(path)

    def _names(self, folder: str) -> frozenset[str] | None:
        """Names in a local folder, empty where there is none; None: too many."""
        if folder in self._local:
            self._local.move_to_end(folder)
            return self._local[folder]
        names = self._local[folder] = _list(folder)
        self._num_kept += _FOLDER_COST + len(names or ())
        while self._num_kept > _KEPT_NAMES:
            _, forgotten = self._local.popitem(last=False)
            self._num_kept -= _FOLDER_COST + len(forgotten or ())
        return names

    def _listed(self, folder: str) -> dict[str, Found]:
        if folder not in self._remote:
            filesystem, inner = filesystem_of(folder)
            with reading(folder):
                try:
                    entries = filesystem.ls(inner, detail=True)
                except (FileNotFoundError, NotADirectoryError):
                    entries = []
            self._remote[folder] = {last_part(entry["name"]): _found_in_store(folder, entry) for entry in entries}
        return self._remote[folder]


def not_found(name: str, tried: Sequence[str]) -> str:
    """The reason of a clip whose file was looked for in vain."""
    looked = " and ".join(shown(one) for one in tried)
    return f"{shown(name)}: there is no such file; looked for {looked}; check media_root"


_EMPTY_ROW = dict.fromkeys(CLIPS_SCHEMA.names)


def _stat(path: str) -> Found | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if S_ISDIR(status.st_mode):
        return _stat_frames(path)
    return Found(path, status.st_size, f"mtime-{status.st_mtime_ns}")


def _stat_frames(folder: str) -> Found | None:
    """A folder of frames; its own size and time stay the same when an image in it is written anew."""
    try:
        found = sorted((one.name, one.stat()) for one in os.scandir(folder) if ending(one.name) in IMAGE_SUFFIXES)
    except OSError:
        return None
    key = json.dumps([[name, status.st_size, status.st_mtime_ns] for name, status in found])
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return Found(folder, sum(status.st_size for _, status in found), f"files-{digest}", is_folder=True)


def _list(folder: str) -> frozenset[str] | None:
    names = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.add(entry.name)
                if len(names) > _LISTED_NAMES:
                    return None
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except (OSError, ValueError):
        return None
    return frozenset(names)


def _joined(etags: Sequence[str]) -> str:
    """One etag for all files of a clip; mtimes share one prefix."""
    if etags and all(etag.startswith("mtime-") for etag in etags):
        return "mtime-" + ",".join(etag.removeprefix("mtime-") for etag in etags)
    return ",".join(etag for etag in etags if etag)


def _found_in_store(folder: str, entry: Mapping[str, Any]) -> Found:
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
    etag = next((str(entry[key]) for key in keys if entry.get(key) is not None), "")
    is_folder = entry.get("type") == "directory"
    return Found(join(folder, last_part(entry["name"])), None if is_folder else entry.get("size"), etag, is_folder)
