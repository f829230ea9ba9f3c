"""Opens http(s) URLs inside a network policy; limits and addresses are checked as bytes arrive.

The standard library's client, because it lets the address that was checked be the address that is connected to (a
second look-up could answer otherwise) and takes no proxy from the environment.
"""

import contextlib
import email.utils
import http.client
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from valley_ray.errors import (
    FetchError,
    FetchInterruptedError,
    FetchTimeoutError,
    ServerBusyError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceRefusedError,
    SourceTooLargeError,
    TransientFetchError,
)
from valley_ray.fetch_connection import Deadline, check_url, connect

_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_CHUNK_BYTES = 1 << 16


def download(
    url: str,
    *,
    allow_hosts: Collection[str],
    allow_private_addresses: bool,
    max_bytes: int,
    timeout_s: float,
    max_redirects: int,
) -> tuple[bytes, str | None]:
    """(content, ETag or None) of `url`.

    Raises:
        SourceTooLargeError: more than `max_bytes`, announced or sent.
        FetchError: as `open_url` and `Answer` raise it; a short body is one.
    """
    with open_url(
        url,
        allow_hosts=allow_hosts,
        allow_private_addresses=allow_private_addresses,
        timeout_s=timeout_s,
        max_redirects=max_redirects,
    ) as answer:
        answer.check_status(200)
        content = bytearray()
        for chunk in answer.chunks(max_bytes=max_bytes):
            content += chunk
        return bytes(content), answer.header("ETag")


@contextlib.contextmanager
def open_url(
    url: str,
    *,
    allow_hosts: Collection[str] | None,
    allow_private_addresses: bool,
    timeout_s: float,
    max_redirects: int,
    stall_timeout_s: float | None = None,
    method: str = "GET",
    headers_for: Callable[[str], Mapping[str, str]] = lambda url: {},
) -> "Iterator[Answer]":
    """Send one request, follow its redirects, and yield the answer with its body unread.

    Args:
        allow_hosts: hosts that the URL and its redirects may name; None: any.
        timeout_s: wall-clock seconds until the connection is shut down, redirects and body included.
        stall_timeout_s: seconds without a byte; None: only `timeout_s` counts.
        headers_for: further headers for a URL; asked again for each redirect, so that credentials stay with their host.

    Raises:
        SourceNotAllowedError: the URL or a redirect names another host, or the host has a private address.
        FetchError: a malformed URL, an unknown host or too many redirects.
        TransientFetchError: no connection, no answer, or not in time.
    """
    hosts = None if allow_hosts is None else {host.lower() for host in allow_hosts}
    silence_s = min(timeout_s, stall_timeout_s or timeout_s)
    with Deadline(timeout_s) as deadline:
        for num_redirects in range(max_redirects + 1):
            parts = check_url(url, hosts)
            connection = connect(parts, allow_private_addresses=allow_private_addresses, timeout_s=silence_s)
            deadline.watch(connection.sock)
            with contextlib.closing(connection):
                try:
                    response = _request(connection, parts, method=method, headers=headers_for(url))
                except (OSError, http.client.HTTPException) as error:
                    raise _failed(parts, error, timeout_s, silence_s, expired=deadline.expired) from error
                if response.status not in _REDIRECTS:
                    yield Answer(url, response, deadline, timeout_s, silence_s, num_requests=num_redirects + 1)
                    return
                target = _redirected(url, response.getheader("Location") or "")
                if response.status not in (307, 308):
                    method = "GET"
            if parts.scheme == "https" and urlsplit(target).scheme != "https":
                raise SourceNotAllowedError(
                    f"{parts.hostname}: redirects from https to plain http, which is not followed"
                )
            url = target
    raise FetchError(f"{urlsplit(url).hostname}: more than {max_redirects=} redirects; give the final URL")


class Answer:
    """A server's answer whose body is read in chunks; usable inside `open_url` only."""

    def __init__(
        self,
        url: str,
        response: http.client.HTTPResponse,
        deadline: Deadline,
        timeout_s: float,
        silence_s: float,
        *,
        num_requests: int,
    ) -> None:
        self.url = url
        """The URL that answered, after redirects."""
        self.status = response.status
        self.num_requests = num_requests
        self.num_bytes_announced = response.length
        """Content-Length; None where the body ends with the connection or comes in chunks."""
        self._response = response
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._host = urlsplit(url).hostname or ""

    def header(self, name: str) -> str | None:
        """A header of the answer."""
        return self._response.getheader(name)

    def check_status(self, *wanted: int) -> None:
        """Return where the status is one of `wanted` and the body is as it is on the server's disk.

        Raises:
            SourceNotFoundError: 404 or 410.
            ServerBusyError: 408, 425, 429 or 5xx, with the pause that the server asks for.
            SourceRefusedError: another 4xx.
            FetchError: any other status, or a compressed body that was not asked for.
        """
        status = self.status
        if status in (404, 410):
            raise SourceNotFoundError(f"{self._host}: no such object (status {status}); check the URL")
        if status in _BUSY or status >= 500:
            pause_s = _retry_after_s(self.header("Retry-After"))
            raise ServerBusyError(
                f"{self._host}: answered with status {status}; try again later", retry_after_s=pause_s
            )
        if 400 <= status < 500:
            raise SourceRefusedError(
                f"{self._host}: answered with status {status}; check the URL and whether it needs cookies or headers"
            )
        if status not in wanted:
            raise FetchError(f"{self._host}: answered with status {status}, which is no file; check the URL")
        if (self.header("Content-Encoding") or "identity") != "identity":
            raise FetchError(f"{self._host}: sent a compressed body that was not asked for")

    def chunks(self, *, max_bytes: int) -> Iterator[bytes]:
        """The body, in the pieces in which it arrives.

        Raises:
            SourceTooLargeError: more than `max_bytes`, announced or sent.
            TransientFetchError: the body ends early, the server goes silent, or the time is over.
        """
        announced = self.num_bytes_announced
        if announced is not None and announced > max_bytes:
            raise SourceTooLargeError(f"{self._host}: announces {announced} bytes, more than {max_bytes=}")
        num_bytes = 0
        while chunk := self._read():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise SourceTooLargeError(f"{self._host}: sends more than {max_bytes=}")
            yield chunk
        if self._deadline.expired or (announced is not None and num_bytes < announced):
            missing = http.client.IncompleteRead(b"", None if announced is None else announced - num_bytes)
            raise self._failed(missing)

    def _read(self) -> bytes:
        try:
            return self._response.read1(_CHUNK_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: http.client's for a connection that the deadline shut in the middle of a chunk's header.
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TransientFetchError:
        parts = urlsplit(self.url)
        return _failed(parts, error, self._timeout_s, self._silence_s, expired=self._deadline.expired)


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError(
            f"{urlsplit(url).hostname}: redirects to no valid URL ({error}); give the final one"
        ) from error


def _request(
    connection: http.client.HTTPConnection, parts: SplitResult, *, method: str, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    target = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*") + (
        f"?{quote(parts.query, safe='/%:=&~+!$,;@()*?[]')}" if parts.query else ""
    )
    default_port = parts.port in (None, 443 if parts.scheme == "https" else 80)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    own = {
        "Host": host if default_port else f"{host}:{parts.port}",
        "Accept-Encoding": "identity",
        "User-Agent": "valley-ray",
        "Connection": "close",
    }
    given = {name.lower() for name in headers}
    connection.request(
        method, target, headers={**{name: own[name] for name in own if name.lower() not in given}, **headers}
    )
    return connection.getresponse()


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as such or as a date; None where there is none that can be read."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _failed(
    parts: SplitResult, error: Exception, timeout_s: float, silence_s: float, *, expired: bool
) -> TransientFetchError:
    if expired:
        return FetchTimeoutError(f"{parts.hostname}: the download took longer than {timeout_s=:g}; try again later")
    if isinstance(error, TimeoutError):
        if silence_s >= timeout_s:
            return FetchTimeoutError(f"{parts.hostname}: the download took longer than {timeout_s=:g}; try again later")
        return FetchTimeoutError(f"{parts.hostname}: sent nothing for {silence_s:g} s; try again later")
    words = " ".join(str(error).split()) or type(error).__name__
    return FetchInterruptedError(f"{parts.hostname}: the download failed ({words}); try again")
