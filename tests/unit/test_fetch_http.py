"""What a URL may name, where it may lead, and what a server may do to the one who asks it."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from valley_ray.errors import (
    FetchError,
    FetchInterruptedError,
    ServerBusyError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceRefusedError,
    SourceTooLargeError,
)
from valley_ray.fetch import FetchPolicy, fetch
from valley_ray.fetch_connection import is_public

LOOPBACK = {"allow_hosts": ("127.0.0.1",), "allow_private_addresses": True}


class Handler(BaseHTTPRequestHandler):
    """Answers by path: what servers do, and what they should not."""

    def do_GET(self):
        path, body = self.path.partition("?")[0], b"v" * 1000
        if path == "/good":
            self.reply(200, body, {"ETag": '"1"'})
        elif path.startswith("/to/"):
            self.reply(302, b"", {"Location": self.path.partition("?")[2]})
        elif path == "/short":
            self.reply(200, body, {"Content-Length": "2000"})
        elif path == "/lies":
            self.reply(200, body * 100, {"Content-Length": None})
        elif path == "/drip":
            self.reply(200, b"", {"Content-Length": "1000"})
            self.drip()
        elif path == "/gzip":
            self.reply(200, body, {"Content-Encoding": "gzip"})
        else:
            self.reply(int(path[1:]), b"")

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        for _ in range(100):
            try:
                self.wfile.write(b".")
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_url_of_an_allowed_host_is_downloaded(server):
    fetched = fetch(f"{server}/good?signature=secret", FetchPolicy(**LOOPBACK))
    assert (fetched.source, fetched.etag, fetched.name) == (b"v" * 1000, '"1"', f"{server}/good")


def test_redirect_within_allowed_hosts_is_followed(server):
    assert fetch(f"{server}/to/?/good", FetchPolicy(**LOOPBACK)).size_bytes == 1000


@pytest.mark.parametrize(
    "url",
    [
        "http://elsewhere.example/a",
        "file:///etc/passwd",
        "http://127.0.0.1@elsewhere.example/",
        "http://localhost/a",
        "//elsewhere.example/",
    ],
)
def test_redirect_elsewhere_is_refused(server, url):
    with pytest.raises(SourceNotAllowedError):
        fetch(f"{server}/to/?{url}", FetchPolicy(**LOOPBACK))


def test_a_redirect_to_no_url_is_refused(server):
    with pytest.raises(FetchError, match="redirects to no valid URL"):
        fetch(f"{server}/to/?http://[", FetchPolicy(**LOOPBACK))


def test_endless_redirects_end(server):
    with pytest.raises(FetchError, match="redirects"):
        fetch(f"{server}/to/?/to/?/to/?/to/?/to/?/good", FetchPolicy(max_redirects=2, **LOOPBACK))


def test_hosts_are_refused_by_default_and_private_addresses_unless_allowed(server):
    with pytest.raises(SourceNotAllowedError, match="not allowed"):
        fetch(f"{server}/good", FetchPolicy())
    with pytest.raises(SourceNotAllowedError, match="not a public address"):
        fetch(f"{server}/good", FetchPolicy(allow_hosts=("127.0.0.1",)))
    with pytest.raises(SourceNotAllowedError, match="not a public address"):
        fetch(server.replace("127.0.0.1", "localhost"), FetchPolicy(allow_hosts=("localhost",)))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.8",
        "192.168.1.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_are_recognised(address):
    assert not is_public(address)


def test_public_addresses_are_recognised():
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")


@pytest.mark.parametrize(
    ("path", "error_class"),
    [
        ("404", SourceNotFoundError),
        ("410", SourceNotFoundError),
        ("403", SourceRefusedError),
        ("500", ServerBusyError),
        ("429", ServerBusyError),
        ("gzip", FetchError),
        ("short", FetchInterruptedError),
    ],
)
def test_bad_answers_are_named(server, path, error_class):
    with pytest.raises(error_class, match=r"127\.0\.0\.1") as caught:
        fetch(f"{server}/{path}", FetchPolicy(**LOOPBACK))
    assert type(caught.value) is error_class


@pytest.mark.parametrize("path", ["good", "lies"])
def test_download_stops_at_the_limit(server, path):
    with pytest.raises(SourceTooLargeError):
        fetch(f"{server}/{path}", FetchPolicy(max_bytes=999, **LOOPBACK))


def test_dripping_server_is_cut_off_in_time(server):
    started = time.monotonic()
    with pytest.raises(FetchError, match="took longer"):
        fetch(f"{server}/drip", FetchPolicy(timeout_s=0.5, **LOOPBACK))
    assert time.monotonic() - started < 5


def test_dead_port_and_bad_urls_are_fetch_errors():
    for url in ("http://127.0.0.1:9/a", "http://127.0.0.1:99999/a", "http://[::1/a"):
        with pytest.raises(FetchError):
            fetch(url, FetchPolicy(timeout_s=5, **LOOPBACK))
