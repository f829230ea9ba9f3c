"""Lists on disk → rows to fetch: VATEX annotations, URL lists, category lists. Knows no network and no Ray.

A row that cannot be used keeps its place, with the reason; rows that ask for the same URL are one download.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from valley_ray.data.download.config import CategoryList, DownloadConfig, UrlList, VatexAnnotations
from valley_ray.data.download.lists import read_json, read_list
from valley_ray.data.sources.valley_instruct import parse_vatex_id
from valley_ray.errors import DataError

_MAX_NAME_BYTES = 200
_PARTIAL_ENDINGS = (".part", ".part.json")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of a list."""

    row_id: str
    source: str
    """Name of the list's file."""
    source_index: int
    """Position of its list in the configuration."""
    method: Literal["http", "page", "api"] = "http"
    """What the URL is: the file, a page that yt-dlp knows, or an API's answer that names the file."""
    url: str = ""
    path: str = ""
    """Of the file, relative to the media root, with slashes."""
    start_s: float | None = None
    end_s: float | None = None
    """Window that the row is about; None: the whole file."""
    sha256: str = ""
    """Digest that the file must have, lower case; empty: any."""
    size_bytes: int | None = None
    error: str = ""
    """Why the row cannot be fetched; empty where it can."""

    @property
    def download_id(self) -> str:
        """Identity of the download, which rows of the same URL share."""
        return hashlib.blake2b(
            f"{self.method}\0{self.url}".encode("utf-8", "surrogatepass"), digest_size=12
        ).hexdigest()

    @property
    def host(self) -> str:
        """Host that is asked first, lower case; empty where the URL names none."""
        try:
            return urlsplit(self.url).hostname or ""
        except ValueError:
            return ""

    @property
    def shown_url(self) -> str:
        """The URL without user and query, which often are secrets that a table should not carry."""
        try:
            parts = urlsplit(self.url)
            return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        except ValueError:
            return ""


def read_rows(config: DownloadConfig) -> list[Row]:
    """All rows of all lists, in order; rows of one URL have one path, expectations that contradict are errors.

    Raises:
        DataError: a list is missing, cannot be read, or all of them are empty.
    """
    rows: list[Row] = []
    for index, source in enumerate(config.sources):
        read = {UrlList: _url_rows, VatexAnnotations: _vatex_rows, CategoryList: _category_rows}[type(source)]
        rows += read(source, index)  # type: ignore[operator]
    if not rows:
        names = ", ".join(str(source.path) for source in config.sources)
        raise DataError(f"nothing to fetch: {names} hold(s) no row; give a list with at least one")
    return _settle(rows)


def _vatex_rows(source: VatexAnnotations, index: int) -> Iterable[Row]:
    """Whole videos with the window kept in the row, rather than sections.

    One download serves all windows of a video, nothing needs ffmpeg or is encoded again, and the window is cut where
    frames are exact: by the decoder. Sections start at key frames and make two files out of one video.
    """
    records, list_name = read_json(source.path, list, "VATEX annotations")[: source.limit], source.path.name
    for number, record in enumerate(records):
        video = record.get("videoID") if isinstance(record, dict) else None
        row = _start(str(video or ""), list_name, number, index, "page")
        try:
            if not isinstance(video, str):
                raise DataError(f"an annotation must be an object with a text videoID, got {record!r:.80}")
            name, start_s, end_s = parse_vatex_id(video)
            path = _path_below(source.folder, source.name.replace("{id}", name))
        except DataError as error:
            yield Row(**row, error=str(error))
        else:
            url = source.page_url.replace("{id}", name)
            yield Row(**row, url=url, path=path, start_s=start_s, end_s=end_s)


def _category_rows(source: CategoryList, index: int) -> Iterable[Row]:
    categories, list_name = read_json(source.path, dict, "a category list"), source.path.name
    records = [
        record for videos in categories.values() for record in (videos if isinstance(videos, list) else [videos])
    ]
    for number, record in enumerate(records[: source.limit]):
        video = record.get(source.id_key) if isinstance(record, dict) else None
        row = _start(str(video or ""), list_name, number, index, "api")
        try:
            if isinstance(video, bool) or not isinstance(video, str | int) or video == "":
                raise DataError(f"a video must be an object with {source.id_key!r}, text or number, got {record!r:.80}")
            path = _path_below(source.folder, source.name.replace("{id}", str(video)))
        except DataError as error:
            yield Row(**row, error=str(error))
        else:
            yield Row(**row, url=source.api_url.replace("{id}", quote(str(video), safe="")), path=path)


def _url_rows(source: UrlList, index: int) -> Iterable[Row]:
    list_name = source.path.name
    for number, record in enumerate(read_list(source.path, url_key=source.url_key, limit=source.limit)):
        given = _text(record, source.id_key)
        row = _start(given, list_name, number, index, source.method)
        try:
            url = _text(record, source.url_key)
            _check_url(url, source.url_key)
            name = _text(record, source.name_key) or (given and given.replace("/", "_")) or _name_of(url)
            name = name if PurePosixPath(name).suffix else name + _ending_of(url)
            row |= {"url": url, "path": _path_below(source.folder, name)}
            yield Row(**row, sha256=_sha256(record, source), size_bytes=_size(record, source))
        except DataError as error:
            yield Row(**row, error=str(error))


def _start(row_id: str, list_name: str, number: int, index: int, method: str) -> dict[str, Any]:
    """What is known of a row whatever it holds."""
    return {"row_id": row_id or f"{list_name}#{number}", "source": list_name, "source_index": index, "method": method}


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return "" if value is None else str(value).strip()


def _check_url(url: str, key: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
        url.encode("utf-8")
    except (ValueError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise DataError(f"{key!r} must be an http(s) URL, got {url!r:.80}")


def _sha256(record: Mapping[str, Any], source: UrlList) -> str:
    text = _text(record, source.sha256_key).lower()
    if text and re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise DataError(f"{source.sha256_key!r} must be 64 hexadecimal digits, got {text!r:.80}")
    return text


def _size(record: Mapping[str, Any], source: UrlList) -> int | None:
    text = _text(record, source.size_key)
    if text and not text.isdecimal():
        raise DataError(f"{source.size_key!r} must be a number of bytes, got {text!r:.80}")
    return int(text) if text else None


def _name_of(url: str) -> str:
    """A readable name, unlike that of any other URL."""
    stem = PurePosixPath(unquote(urlsplit(url).path)).stem
    digest = hashlib.blake2b(url.encode(), digest_size=5).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)[:80].strip('._') or 'video'}-{digest}{_ending_of(url)}"


def _ending_of(url: str) -> str:
    ending = PurePosixPath(urlsplit(url).path).suffix
    return ending if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", ending) else ".mp4"


def _path_below(folder: str, name: str) -> str:
    path = PurePosixPath(folder, name)
    inside = not path.is_absolute() and ".." not in path.parts and path.name != ""
    encodable = name.isprintable() and all(
        len(part.encode("utf-8", "replace")) <= _MAX_NAME_BYTES for part in path.parts
    )
    if not inside or not encodable or path.name.startswith(".") or path.name.endswith(_PARTIAL_ENDINGS):
        raise DataError(f"the name {name!r:.80} is no file name below media_root; give a plain relative one")
    return str(path)


def _settle(rows: list[Row]) -> list[Row]:
    """Give rows of one URL one path and one expectation, and paths to one URL each; the first row decides."""
    first: dict[tuple[str, str], Row] = {}
    owner: dict[str, Row] = {}
    for row in rows:
        if not row.error:
            known = first.setdefault((row.method, row.url), row)
            if known is not row:
                size_bytes = row.size_bytes if known.size_bytes is None else known.size_bytes
                known = dataclasses.replace(known, sha256=known.sha256 or row.sha256, size_bytes=size_bytes)
                first[row.method, row.url] = known
            owner.setdefault(known.path, known)
    return [row if row.error else _settled(row, first[row.method, row.url], owner) for row in rows]


def _settled(row: Row, known: Row, owners: Mapping[str, Row]) -> Row:
    """`row` with what `known`, the first of its URL, decides; `owners` are the first rows by path."""
    owner = owners[known.path]
    if row is known and owner is row:
        return row
    if (owner.method, owner.url) != (known.method, known.url):
        return dataclasses.replace(row, error=f"the name {known.path!r} is another URL's already; give another one")
    if row.sha256 not in ("", known.sha256) or row.size_bytes not in (None, known.size_bytes):
        return dataclasses.replace(row, error=f"row {known.row_id!r} has the same URL and another sha256 or size")
    return dataclasses.replace(row, path=known.path, sha256=known.sha256, size_bytes=known.size_bytes)
