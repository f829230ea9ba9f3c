"""Videos with a window in their id: ``<YouTube id>_<start>_<end>``, in Valley-Instruct-65k and in VATEX.

Valley-Instruct-65k: ``{"id", "v_id", "video", "source": "VATEX" | "jukinmedia", "conversations"}``. Its VATEX part is
about a window in seconds of the video, and `video` names the whole of it (its dataset card; the original's crawler
saves whole videos as `v_<YouTube id>.mp4`, and its trainer never crops them). People also cut the clips beforehand and
call them by the windowed id. Which of the two lies on the disk decides: a file whose name carries the window is the
clip itself, any other is cropped to the window. Ids of jukinmedia carry no window.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from valley_ray.data.sources.files import is_url, join, last_part
from valley_ray.data.sources.media import Media, make_row, video_folders
from valley_ray.data.sources.rows import id_text
from valley_ray.errors import DataError

VIDEO_ID_KEYS = ("v_id", "videoID")

_WINDOWED_ID = re.compile(r"([A-Za-z0-9_-]{11})_(\d{6})_(\d{6})")
_ID_CHARS = 25
_ENDINGS = (".mp4", ".webm", ".mkv", ".avi")
"""What downloads of one video may end in."""


def has_video_id(record: Mapping[str, Any]) -> bool:
    """Whether a record names its video by an id, or its VATEX file by a windowed one."""
    return any(key in record for key in VIDEO_ID_KEYS) or _windowed_name(record) is not None


def video_id_of(record: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, id) of a record that `has_video_id`: the one that carries a window, where one does."""
    ids = [(key, record[key]) for key in VIDEO_ID_KEYS if key in record]
    windowed = [(key, value) for key, value in ids if isinstance(value, str) and _WINDOWED_ID.fullmatch(value)]
    return next(iter([*windowed, *ids]), ("video", _windowed_name(record)))


def parse_windowed_id(text: str) -> tuple[str, float, float] | None:
    """(YouTube id, start, end in seconds) of an id that carries a window; None for any other id.

    Raises:
        DataError: a window that ends before it starts.
    """
    match = _WINDOWED_ID.fullmatch(text)
    if match is None:
        return None
    start_s, end_s = float(match[2]), float(match[3])
    if end_s <= start_s:
        raise DataError(f"id {text!r}: the window ends at {end_s:g} s, before its start at {start_s:g} s")
    return match[1], start_s, end_s


def parse_vatex_id(text: str) -> tuple[str, float, float]:
    """(YouTube id, start, end in seconds) of a VATEX `videoID`, which always carries a window.

    Raises:
        DataError: not eleven characters and twice six digits, or a window that ends before it starts.
    """
    parsed = parse_windowed_id(text)
    if parsed is None:
        raise DataError(f"videoID must read <11 characters>_<6 digits>_<6 digits>, got {text!r:.80}")
    return parsed


def windowed_clip(media: Media, kind: str, names: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The clip row of a record with an id of VIDEO_ID_KEYS: the cut clip where it is there, else window and video.

    Raises:
        DataError: the id is no text, or its window is empty.
    """
    key, value = video_id_of(record)
    video_id = id_text(value, key)
    parsed = parse_windowed_id(video_id) if kind == "video" else None
    if kind != "video" or is_url(names[0]):
        return _with_window(media.clip(kind, names, record), parsed)
    if parsed is None:
        return _first(media, record, [*_spellings(names[0]), *_named(f"v_{video_id}"), *_named(video_id)])
    youtube_id, start_s, end_s = parsed
    carries_window = video_id in names[0]
    cut = [*(_spellings(names[0]) if carries_window else ()), *_named(video_id), *_named(f"v_{video_id}")]
    whole = [*(() if carries_window else _spellings(names[0])), *_named(f"v_{youtube_id}"), *_named(youtube_id)]
    return _first(media, record, cut, whole, window=(start_s, end_s))


def _windowed_name(record: Mapping[str, Any]) -> str | None:
    """The windowed id that the file name of a VATEX record is."""
    name = record.get("video")
    if not isinstance(name, str) or str(record.get("source")).lower() != "vatex":
        return None
    stem = PurePosixPath(name).stem
    stem = stem.removeprefix("v_") if len(stem) > _ID_CHARS else stem
    return stem if _WINDOWED_ID.fullmatch(stem) else None


def _with_window(row: dict[str, Any], parsed: tuple[str, float, float] | None) -> dict[str, Any]:
    """`row` cropped, unless its URL carries the window."""
    if parsed is None or "_{:06d}_{:06d}".format(*map(int, parsed[1:])) in last_part(row["uri"]):
        return row
    return make_row(row["kind"], row["uri"], [], start_s=parsed[1], end_s=parsed[2], error=row["error"])


def _first(
    media: Media,
    record: Mapping[str, Any],
    cut: Iterable[str],
    whole: Iterable[str] = (),
    *,
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The row of the first file that is there: of `cut` as it is, of `whole` with the window."""
    folders = video_folders(record, media.root)
    cut, whole = list(dict.fromkeys(cut)), list(dict.fromkeys(whole))
    found = media.first(join(folder, name) for folder in folders for name in cut)
    start_s, end_s = (None, None) if found or window is None else window
    if found is None:
        found = media.first(join(folder, name) for folder in folders for name in whole)
    if found:
        return make_row("video", found.uri, [found], start_s=start_s, end_s=end_s)
    names = [*whole, *cut]
    error = f"{names[0]}: there is no such file; looked for {', '.join(names)} in {' and '.join(folders)}"
    return make_row("video", join(folders[0], names[0]), [], start_s=start_s, end_s=end_s, error=error)


def _spellings(name: str) -> list[str]:
    return [name] if ".mp4" in name else [name, f"{name}.mp4"]


def _named(stem: str) -> list[str]:
    return [stem + ending for ending in _ENDINGS]
