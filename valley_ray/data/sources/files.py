"""Bytes and lines of record files, wherever they lie: local paths, buckets, http(s), any file system of fsspec.

Knows nothing of what the bytes mean. Whatever goes wrong while reading is a DataError that names the file; what a URL
says after `?` and before `@` is often a secret, and no message or table shows it.
"""

import codecs
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow as pa

from valley_ray.errors import DataError

CHUNK_BYTES = 1 << 18
MAX_LINE_BYTES = 64 << 20
"""Longest line of a text file; a longer one is no line of records."""

_STALL_TIMEOUT_S = 60.0
"""Seconds without a byte before a web server is given up."""
_RETRY_LIMIT_S = 20
"""Seconds in which a request to Google's store is tried again."""
_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs")
"""File systems that pyarrow brings along; the others are fsspec's."""
BUCKET_SCHEMES = (*_ARROW_SCHEMES, "abfs", "abfss", "az", "adl", "oss", "memory")
"""What media may lie on beside disks and web servers; records name them, so that this is not left to fsspec."""


def normalized(path: str) -> str:
    """`path` as the other functions take it: a file: URL becomes a local path."""
    if path[:7].lower() != "file://":
        return path
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise DataError(f"{path}: a file: URL must read file:///absolute/path")
    return unquote(parts.path)


def is_url(path: str) -> bool:
    """Whether `path` names another file system than the local one."""
    return "://" in path


def scheme_of(path: str) -> str:
    """Lower-case scheme of a URL; empty for a local path."""
    return path.partition("://")[0].lower() if is_url(path) else ""


def shown(path: str) -> str:
    """`path` without user, password and query."""
    if not is_url(path):
        return path
    try:
        parts = urlsplit(path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return path.partition("?")[0]


def last_part(path: str) -> str:
    """Name of the file or folder, without what leads to it."""
    name = shown(path).rstrip("/").rpartition("/")[2]
    return name if is_url(path) or name not in ("", ".", "..") else os.path.basename(os.path.abspath(path)) or "/"


def ending(path: str) -> str:
    """Lower-case suffix of the last part, with its dot; empty where there is none."""
    return PurePosixPath(last_part(path)).suffix.lower()


def parent(path: str) -> str:
    """The folder that `path` lies in."""
    if not is_url(path):
        return os.path.dirname(os.path.abspath(path))
    return path.partition("?")[0].rstrip("/").rpartition("/")[0]


def beside(path: str, name: str) -> str:
    """The path of file `name` in the folder of `path`; a URL keeps its query."""
    _, mark, query = path.partition("?") if is_url(path) else (path, "", "")
    return join(parent(path), name) + mark + query


def join(folder: str, name: str) -> str:
    """`name` below `folder`; a name that is a URL, or absolute below a local folder, stands for itself."""
    if is_url(name):
        return name
    if not is_url(folder):
        return os.path.join(folder, name)
    return f"{folder.rstrip('/')}/{name.lstrip('/')}"


def filesystem_of(url: str) -> tuple[Any, str]:
    """(fsspec file system, path on it) of a URL.

    Raises:
        DataError: an unknown scheme, or a file system that is not installed or refuses.
    """
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    try:
        if scheme_of(url) in _ARROW_SCHEMES:
            filesystem, path = FileSystem.from_uri(_impatient(url))
            return ArrowFSWrapper(filesystem), path
        filesystem, path = fsspec.core.url_to_fs(url, **(_web_options() if is_web(url) else {}))
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise _unreadable(url, error) from error
    return filesystem, path


def is_web(path: str) -> bool:
    """Whether `path` is an http(s) URL, of which there are no listings."""
    return path[:8].lower().startswith(("http://", "https://"))


def exists(path: str) -> bool:
    """Whether there is a file or folder at `path`."""
    if not is_url(path):
        return os.path.exists(path)
    with reading(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.exists(inner))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; never for http(s), which has none."""
    if not is_url(path):
        return os.path.isdir(path)
    if is_web(path):
        return False
    with reading(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.isdir(inner))


def list_folder(path: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what a folder holds, in no order; raises DataError where it cannot be read."""
    with reading(path):
        if not is_url(path):
            with os.scandir(path) as entries:
                return [(entry.name, _is_dir(entry)) for entry in entries]
        filesystem, inner = filesystem_of(path)
        return [(last_part(entry["name"]), entry["type"] == "directory") for entry in filesystem.ls(inner, detail=True)]


def read_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a file, a quarter of a megabyte at a time."""
    with reading(path), _open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 text file with their ends; a byte order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, num_bytes = "", 0
    for chunk in read_chunks(path):
        rest += decode(decoder, chunk, offset=num_bytes, name=shown(path))
        num_bytes += len(chunk)
        *lines, rest = rest.split("\n")
        yield from (line + "\n" for line in lines)
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(f"{shown(path)}: a line of more than {MAX_LINE_BYTES >> 20} MB; is this a table of text?")
    rest += decode(decoder, b"", offset=num_bytes, name=shown(path), final=True)
    if rest:
        yield rest


def decode(decoder: codecs.IncrementalDecoder, chunk: bytes, *, offset: int, name: str, final: bool = False) -> str:
    """The text of `chunk`, which begins at byte `offset`; raises DataError where it is not UTF-8."""
    num_pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        at = offset - num_pending + error.start
        raise DataError(
            f"records {name} are not UTF-8 text ({error.reason} at byte {at}); save them as UTF-8"
        ) from error


@contextlib.contextmanager
def open_seekable(path: str) -> Iterator[IO[bytes]]:
    """A file to read at random; what cannot be read so (http) is copied to a temporary file first."""
    if not is_web(path):
        with reading(path), _open(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        for chunk in read_chunks(path):
            copy.write(chunk)
        copy.seek(0)
        yield copy


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong while `path` is being read into a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        # aiohttp's errors are no OSError, and importing it for local files costs a tenth of a second.
        if type(error).__module__.partition(".")[0] != "aiohttp":
            raise
        raise _unreadable(path, error) from error


def _impatient(url: str) -> str:
    """`url` with a bound on how long Google's client tries again: its own is a quarter of an hour."""
    if scheme_of(url) not in ("gs", "gcs") or "retry_limit_seconds=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds={_RETRY_LIMIT_S}"


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: for whoever opens it to tell
        return False


def _web_options() -> dict[str, Any]:
    """aiohttp gives up after five minutes, however well a download goes on."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL_TIMEOUT_S, sock_read=_STALL_TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout}}


def _open(path: str) -> Any:
    if not is_url(path):
        return open(path, "rb")
    filesystem, inner = filesystem_of(path)
    # block_size=0 makes http stream: many servers know no ranges.
    return filesystem.open(inner, "rb", **({"block_size": 0} if is_web(path) else {}))


def _unreadable(path: str, error: BaseException) -> DataError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    reason = "there is no such file" if reason == path else reason.replace(path, shown(path))[:200]
    advice = "check its address and the credentials in the environment" if is_url(path) else "give one that can be read"
    return DataError(f"cannot read records {shown(path)}: {reason}; {advice}")
