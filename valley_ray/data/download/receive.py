"""An http(s) URL → the bytes of a partial file, resumed where the server says that they are still the same."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.partial import Origin, open_partial, read_origin, write_origin
from valley_ray.errors import FetchInterruptedError, SourceTooLargeError
from valley_ray.fetch_http import Answer, open_url

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclasses.dataclass(frozen=True)
class Received:
    """A partial file whose last byte has arrived."""

    etag: str
    """The server's validator of the bytes; empty where it gives none."""
    is_length_known: bool
    """Whether the server said how many bytes there are; where it did not, a lost connection looks like the end."""
    is_resumed: bool
    """Whether bytes of an earlier attempt were kept."""
    num_requests: int


def receive(
    url: str,
    part: Path,
    *,
    download_id: str,
    config: DownloadConfig,
    timeout_s: float,
    headers_for: Callable[[str], Mapping[str, str]],
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Received:
    """Fetch `url` into `part`, after the bytes that are there where Range and If-Range allow it, else from the start.

    Raises:
        FetchError: as `open_url` and `Answer` raise it. What has arrived stays in `part`.
        StorageError: the disk is full or not writable.
    """
    with open_partial(part) as file:
        origin = read_origin(part, download_id)
        offset = file.tell() if origin is not None and origin.validator else 0
        asked = {"Range": f"bytes={offset}-", "If-Range": origin.validator} if origin is not None and offset else {}
        with open_url(
            url,
            allow_hosts=config.allow_hosts,
            allow_private_addresses=config.allow_private_addresses,
            timeout_s=timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            max_redirects=config.max_redirects,
            headers_for=lambda target: {**headers_for(target), **asked},
        ) as answer:
            if asked and answer.status == 416:
                if _range(answer) == (None, offset):
                    return Received(asked["If-Range"], True, True, answer.num_requests)
                _forget(part, file)
                raise FetchInterruptedError(f"{part.name}: the server has other bytes by now; from the start")
            answer.check_status(200, *((206,) if asked else ()))
            if answer.status != 206:
                offset = 0
                if file.tell():
                    file.truncate(0)
                write_origin(part, Origin(download_id, _validator(answer)))
            elif _range(answer)[0] != offset:
                _forget(part, file)
                raise FetchInterruptedError(f"{part.name}: the server sent another range than asked; from the start")
            _append(answer, file, offset=offset, config=config, on_bytes=on_bytes)
            etag = _validator(answer)
            return Received(etag, answer.num_bytes_announced is not None, offset > 0, answer.num_requests)


def _append(
    answer: Answer, file: BinaryIO, *, offset: int, config: DownloadConfig, on_bytes: Callable[[int], None]
) -> None:
    if offset >= config.max_bytes:
        raise SourceTooLargeError(f"{offset} bytes are there already, max_bytes={config.max_bytes}")
    try:
        for chunk in answer.chunks(max_bytes=config.max_bytes - offset):
            file.write(chunk)
            on_bytes(len(chunk))
    finally:
        file.flush()


def _forget(part: Path, file: BinaryIO) -> None:
    write_origin(part, Origin("", ""))
    file.truncate(0)


def _validator(answer: Answer) -> str:
    """What If-Range takes: a strong ETag, else the time of the last change."""
    etag = answer.header("ETag") or ""
    return etag if etag and not etag.startswith("W/") else answer.header("Last-Modified") or ""


def _range(answer: Answer) -> tuple[int | None, int | None]:
    """(first byte, bytes in all) of Content-Range, as far as it says them."""
    match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range") or "")
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[3]) if match[3] != "*" else None
