"""Downloads one http(s) URL into memory from allowed hosts; limits and addresses are checked as bytes arrive.

The standard library's client, because it lets the address that was checked be the address that is connected to (a
second look-up could answer otherwise) and takes no proxy from the environment.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Collection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from valley_ray.errors import FetchError, SourceNotAllowedError, SourceNotFoundError, SourceTooLargeError

_REDIRECTS = (301, 302, 303, 307, 308)
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
        SourceNotAllowedError: the URL or a redirect names another host, or the host has a private address.
        SourceNotFoundError: status 404 or 410.
        SourceTooLargeError: more than `max_bytes`, announced or sent.
        FetchError: anything else that goes wrong, a short body and the time limit included.
    """
    hosts = {host.lower() for host in allow_hosts}
    with _Deadline(timeout_s) as deadline:
        for _ in range(max_redirects + 1):
            parts = _check_url(url, hosts)
            connection = _connect(parts, allow_private_addresses=allow_private_addresses, timeout_s=timeout_s)
            deadline.watch(connection.sock)
            try:
                response = _request(connection, parts)
                if response.status not in _REDIRECTS:
                    return _read(response, host=parts.netloc, max_bytes=max_bytes), response.getheader("ETag")
                target = urljoin(url, response.getheader("Location") or "")
            except (OSError, http.client.HTTPException) as error:
                raise _failed(parts, error, timeout_s, expired=deadline.expired) from error
            finally:
                connection.close()
            if parts.scheme == "https" and urlsplit(target).scheme != "https":
                raise SourceNotAllowedError(
                    f"{parts.hostname}: redirects from https to plain http, which is not followed"
                )
            url = target
    raise FetchError(f"{urlsplit(url).hostname}: more than {max_redirects=} redirects; give the final URL")


class _Deadline:
    """Shuts the watched connection down when the time is over, however slowly bytes drip in."""

    def __init__(self, timeout_s: float) -> None:
        self.expired = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            if self.expired:
                self._shut()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            # The plain socket's shutdown: that of a TLS socket takes the session from under the reading thread.
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _check_url(url: str, hosts: set[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises ValueError for a bad port)
    except ValueError as error:
        raise FetchError(f"not a valid URL ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise SourceNotAllowedError(f"scheme {parts.scheme!r} is not followed; give an http(s) URL")
    host = (parts.hostname or "").rstrip(".")
    if host not in hosts:
        known = ", ".join(sorted(hosts)) or "none"
        raise SourceNotAllowedError(f"host {host!r} is not allowed (allowed: {known}); send the bytes as a data: URI")
    if not host.isascii():
        raise FetchError(f"host {host!r}: give it in its ASCII form (punycode)")
    return parts


def _connect(parts: SplitResult, *, allow_private_addresses: bool, timeout_s: float) -> http.client.HTTPConnection:
    """Connect to the addresses that were checked, in turn."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FetchError(f"{host}: no address found ({error.strerror or error}); check the host name") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private_addresses:
        private = [address for address in addresses if not _is_public(address)]
        if private:
            raise SourceNotAllowedError(f"{host}: resolves to {private[0]}, which is not a public address")
    problem: OSError | None = None
    for address in addresses:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.sock = socket.create_connection((address, port), timeout=timeout_s)
            if parts.scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise FetchError(f"{host}: cannot connect ({problem}); try again later") from problem


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if embedded is not None:
            return embedded.is_global
    return parsed.is_global and not parsed.is_multicast


def _request(connection: http.client.HTTPConnection, parts: SplitResult) -> http.client.HTTPResponse:
    target = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*") + (
        f"?{quote(parts.query, safe='/%:=&~+!$,;@()*?[]')}" if parts.query else ""
    )
    default_port = parts.port in (None, 443 if parts.scheme == "https" else 80)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    headers = {
        "Host": host if default_port else f"{host}:{parts.port}",
        "Accept-Encoding": "identity",
        "User-Agent": "valley-ray",
        "Connection": "close",
    }
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _read(response: http.client.HTTPResponse, *, host: str, max_bytes: int) -> bytes:
    if response.status in (404, 410):
        raise SourceNotFoundError(f"{host}: no such object (status {response.status}); check the URL")
    if response.status != 200:
        raise FetchError(f"{host}: answered with status {response.status}; try again later or check the URL")
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{host}: sent a compressed body that was not asked for")
    announced = response.length
    if announced is not None and announced > max_bytes:
        raise SourceTooLargeError(f"{host}: announces {announced} bytes, more than {max_bytes=}")
    content = bytearray()
    while chunk := response.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise SourceTooLargeError(f"{host}: sends more than {max_bytes=}")
    if announced is not None and len(content) < announced:
        raise http.client.IncompleteRead(b"", announced - len(content))
    return bytes(content)


def _failed(parts: SplitResult, error: Exception, timeout_s: float, *, expired: bool) -> FetchError:
    if expired or isinstance(error, TimeoutError):
        return FetchError(f"{parts.hostname}: the download took longer than {timeout_s=}; try again later")
    words = " ".join(str(error).split()) or type(error).__name__
    return FetchError(f"{parts.hostname}: the download failed ({words}); try again")
