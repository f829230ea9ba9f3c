"""One attempt at one file: receive it, look into it, put it in place. Knows no Ray; runs in a thread of a worker.

A file has its name only after its length and digest were checked and a decoder in the sandbox took it for a video.
"""

import contextlib
import dataclasses
import http.cookiejar
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from valley_ray.data.download.config import CategoryList, DownloadConfig
from valley_ray.data.download.credentials import Credentials, cookie_jar, headers_for
from valley_ray.data.download.page import receive_page
from valley_ray.data.download.partial import discard, part_of, promote, sha256_of
from valley_ray.data.download.receive import Received, receive
from valley_ray.data.download.sources import Row
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.errors import (
    ContentMismatchError,
    FetchError,
    FetchInterruptedError,
    MediaError,
    NotMediaError,
    StorageError,
    TransientFetchError,
    ValleyError,
)
from valley_ray.fetch_http import open_url
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox

logger = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a download so far."""

    download_id: str
    path: str
    """Of the file, relative to the media root."""
    status: str
    """ok, failed, or pending where another attempt may pass."""
    error_class: str = ""
    error: str = ""
    attempts: int = 0
    size_bytes: int | None = None
    seconds: float = 0.0
    """Over all attempts, pauses not counted."""
    sha256: str = ""
    etag: str = ""
    num_requests: int = 0
    """Of this attempt, as far as is known."""
    retry_after_s: float | None = None
    """Pause that the server asks for."""


class Downloader:
    """Makes attempts, several at once from as many threads; all of them look into files through one sandbox."""

    def __init__(self, config: DownloadConfig, credentials: list[Credentials], sandbox: Sandbox) -> None:
        self._config = config
        self._credentials = credentials
        self._jars: list[http.cookiejar.CookieJar] = [cookie_jar(one.cookies) for one in credentials]
        self._sandbox = sandbox
        self.num_bytes_received = 0
        """Bytes that have come through this process over HTTP, for progress; pages are not counted."""

    def attempt(self, row: Row, *, timeout_s: float, adopt: bool) -> Outcome:
        """One attempt at the file of `row`. With `adopt`, a file that is there already and passes is taken as it is.

        Raises:
            StorageError: the disk is full or not writable, which no other row would fare better with.
        """
        started = time.monotonic()
        path = self._config.media_root / row.path
        outcome = Outcome(row.download_id, row.path, PENDING, attempts=1)
        try:
            if adopt and (adopted := self._adopt(row, path)) is not None:
                return adopted
            received, part = self._receive(row, path, timeout_s)
            outcome = dataclasses.replace(outcome, num_requests=received.num_requests, etag=received.etag)
            sha256 = self._check_received(part, row, received)
            size_bytes = part.stat().st_size
            promote(part, path)
            outcome = dataclasses.replace(outcome, status=OK, size_bytes=size_bytes, sha256=sha256)
        except StorageError:
            raise
        except TransientFetchError as error:
            outcome = dataclasses.replace(
                outcome, error_class=error.code, error=str(error), retry_after_s=error.retry_after_s
            )
        except ValleyError as error:
            for part in (part_of(path), _page_part(path), part_of(_page_part(path))):
                discard(part)
            outcome = dataclasses.replace(outcome, status=FAILED, error_class=error.code, error=str(error))
        return dataclasses.replace(outcome, seconds=time.monotonic() - started)

    def _adopt(self, row: Row, path: Path) -> Outcome | None:
        """A file of an earlier run whose end was not recorded, or of the user's own; None where it does not pass."""
        if not path.is_file():
            return None
        with contextlib.suppress(ValleyError):
            sha256 = self._check(path, row)
            return Outcome(row.download_id, row.path, OK, size_bytes=path.stat().st_size, sha256=sha256)
        logger.warning("%s is there but does not pass; it is fetched anew", row.path)
        return None

    def _receive(self, row: Row, path: Path, timeout_s: float) -> tuple[Received, Path]:
        credentials, jar = self._credentials[row.source_index], self._jars[row.source_index]
        deadline = time.monotonic() + timeout_s
        if row.method == "page":
            part = _page_part(path)
            receive_page(row.url, part, config=self._config, credentials=credentials, timeout_s=timeout_s)
            return Received("", True, False, 1), part
        url, num_requests = row.url, 0
        own = headers_for(credentials, jar, row.url)
        if row.method == "api":
            source = self._config.sources[row.source_index]
            assert isinstance(source, CategoryList), "only category lists ask an API"
            url, num_requests = self._ask_api(row.url, source, own, timeout_s)
        received = receive(
            url,
            part_of(path),
            download_id=row.download_id,
            config=self._config,
            timeout_s=max(1e-3, deadline - time.monotonic()),
            headers_for=own,
            on_bytes=self._count,
        )
        return dataclasses.replace(received, num_requests=received.num_requests + num_requests), part_of(path)

    def _ask_api(
        self, url: str, source: CategoryList, headers_for: Callable[[str], dict[str, str]], timeout_s: float
    ) -> tuple[str, int]:
        """(URL of the file, requests made)."""
        with open_url(
            url,
            allow_hosts=self._config.allow_hosts,
            allow_private_addresses=self._config.allow_private_addresses,
            timeout_s=timeout_s,
            stall_timeout_s=self._config.stall_timeout_s,
            max_redirects=self._config.max_redirects,
            method=source.api_method,
            headers_for=headers_for,
        ) as answer:
            answer.check_status(200)
            content = b"".join(answer.chunks(max_bytes=_MAX_ANSWER_BYTES))
            return urljoin(answer.url, _value_at(content, source.file_url_key)), answer.num_requests

    def _check_received(self, part: Path, row: Row, received: Received) -> str:
        """As `_check`; what may be the fault of the way here, not of the file, is fetched again from the start."""
        try:
            return self._check(part, row)
        except (MediaError, ContentMismatchError) as error:
            may_be_cut = not received.is_length_known and not isinstance(error, NotMediaError)
            if not received.is_resumed and not may_be_cut:
                raise
            discard(part)
            why = "it was resumed" if received.is_resumed else "the server did not say how long it is"
            raise FetchInterruptedError(f"{error} ({why})") from error

    def _check(self, part: Path, row: Row) -> str:
        """Hex digest of a file that is what it should be: its size, its digest, a video whose head decodes."""
        size_bytes, name = part.stat().st_size, Path(row.path).name
        if row.size_bytes not in (None, size_bytes):
            raise ContentMismatchError(f"{name}: {size_bytes} bytes came, expected {row.size_bytes}; check the list")
        sha256 = sha256_of(part)
        if row.sha256 not in ("", sha256):
            raise ContentMismatchError(f"{name}: sha256 {sha256} came, expected {row.sha256}; check the list")
        info = self._sandbox.probe(part, name=name)
        if info.kind != "video":
            raise NotMediaError(f"{name}: an image ({info.codec}), not a video; check the URL")
        self._sandbox.frames(part, FrameSampling(num_frames=1), name=name)
        return sha256

    def _count(self, num_bytes: int) -> None:
        # Threads may lose an addition to each other; this is for a progress line.
        self.num_bytes_received += num_bytes


def _page_part(path: Path) -> Path:
    """Where yt-dlp puts a video: apart from the bytes of plain downloads, which it would take for its own."""
    return path.with_name(f"{path.name}.page.part")


def _value_at(content: bytes, key: str) -> str:
    """The text at a dotted key of a JSON answer; raises FetchError where there is none."""
    try:
        value: Any = json.loads(content)
        for step in key.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
    except (ValueError, LookupError, TypeError) as error:
        raise FetchError(f"the API's answer holds nothing at file_url_key={key!r}; check the id and the key") from error
    if not isinstance(value, str) or not value:
        raise FetchError(f"the API's answer holds {value!r:.80} at file_url_key={key!r}, expected a URL")
    return value
