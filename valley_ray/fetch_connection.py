"""Connections to the hosts of http(s) URLs: which may be asked, at which addresses, and for how long."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import SplitResult, urlsplit

from valley_ray.errors import FetchError, FetchInterruptedError, SourceNotAllowedError


class Deadline:
    """Shuts the watched connection down when the time is over, however slowly bytes drip in."""

    def __init__(self, timeout_s: float) -> None:
        self.expired = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        """Watch this connection from now on."""
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


def check_url(url: str, hosts: set[str] | None) -> SplitResult:
    """The parts of a URL that may be asked for; `hosts` None: any host.

    Raises:
        SourceNotAllowedError: neither http nor https, or another host.
        FetchError: not a valid URL.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises ValueError for a bad port)
    except ValueError as error:
        raise FetchError(f"not a valid URL ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise SourceNotAllowedError(f"scheme {parts.scheme!r} is not followed; give an http(s) URL")
    host = (parts.hostname or "").rstrip(".")
    if not host:
        raise FetchError("not a valid URL (it names no host)")
    if hosts is not None and host not in hosts:
        known = ", ".join(sorted(hosts)) or "none"
        raise SourceNotAllowedError(f"host {host!r} is not allowed (allowed: {known}); send the bytes as a data: URI")
    if not host.isascii():
        raise FetchError(f"host {host!r}: give it in its ASCII form (punycode)")
    return parts


def connect(parts: SplitResult, *, allow_private_addresses: bool, timeout_s: float) -> http.client.HTTPConnection:
    """Connect to the addresses that were checked, in turn.

    Raises:
        SourceNotAllowedError: the host has a private address, which is not allowed.
        FetchInterruptedError: nobody answers there.
        FetchError: there is no such host, or its certificate is not valid.
    """
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        # UnicodeError: a label that is too long for a host name.
        message = f"{host}: no address found ({getattr(error, 'strerror', None) or error}); check the host name"
        is_passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise (FetchInterruptedError if is_passing else FetchError)(message) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private_addresses:
        private = [address for address in addresses if not is_public(address)]
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
    if isinstance(problem, ssl.SSLCertVerificationError):
        raise FetchError(f"{host}: its certificate is not valid ({problem.verify_message})") from problem
    raise FetchInterruptedError(f"{host}: cannot connect ({problem}); try again later") from problem


def is_public(address: str) -> bool:
    """Whether an IP address can be anybody's: not loopback, private, link-local, multicast or one of those in IPv6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if embedded is not None:
            return embedded.is_global
    return parsed.is_global and not parsed.is_multicast
