"""Locators become files or bytes inside the policy, and nothing else."""

import base64
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
from valley_ray.fetch import FetchPolicy, fetch, locator_kind, media_key
from valley_ray.fetch_connection import is_public

LOOPBACK = {"allow_hosts": ("127.0.0.1",), "allow_private_addresses": True}


def data_uri(content, media_type="video/mp4"):
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def test_any_local_path_by_default(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"12345")
    for locator in (str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4", f"file://localhost{tmp_path}/a.mp4"):
        fetched = fetch(locator, FetchPolicy())
        assert fetched.source == (tmp_path / "a.mp4").resolve()
        assert fetched.size_bytes == 5


def test_relative_path_and_escaped_file_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.mp4").write_bytes(b"12345")
    assert fetch("a b.mp4", FetchPolicy()).source == fetch(f"file://{tmp_path}/a%20b.mp4", FetchPolicy()).source


def test_folder_counts_the_bytes_of_its_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"123")
    (tmp_path / "b.png").write_bytes(b"45")
    assert fetch(str(tmp_path), FetchPolicy()).size_bytes == 5


def test_paths_outside_the_roots_are_refused(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"x")
    (inside / "link.mp4").symlink_to(outside / "secret.mp4")
    (inside / "a.mp4").write_bytes(b"x")
    policy = FetchPolicy(allow_roots=(inside,))
    assert fetch(str(inside / "a.mp4"), policy).size_bytes == 1
    for locator in (
        outside / "secret.mp4",
        outside / "missing.mp4",
        inside / "link.mp4",
        inside / ".." / "out" / "secret.mp4",
        inside / ".." / "out" / "missing.mp4",
        Path("/etc/passwd"),
        tmp_path / "in2" / "a.mp4",
    ):
        with pytest.raises(SourceNotAllowedError, match="outside the folders"):
            fetch(str(locator), policy)
    with pytest.raises(SourceNotFoundError):
        fetch(str(inside / "missing.mp4"), policy)
    with pytest.raises(SourceNotAllowedError, match="local paths are not taken"):
        fetch(str(inside / "a.mp4"), FetchPolicy(allow_roots=()))


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for locator in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(SourceNotAllowedError, match="neither a file nor a folder"):
            fetch(str(locator), FetchPolicy())


def test_missing_and_impossible_paths_are_not_found(tmp_path):
    for locator in (str(tmp_path / "gone.mp4"), "a\0b.mp4", "x" * 5000, ""):
        if locator:
            with pytest.raises(SourceNotFoundError) as caught:
                fetch(locator, FetchPolicy())
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 400


def test_large_file_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    with pytest.raises(SourceTooLargeError, match="100 bytes"):
        fetch(str(tmp_path / "a.mp4"), FetchPolicy(max_bytes=99))


def test_data_uri_gives_its_bytes():
    fetched = fetch(data_uri(b"hello"), FetchPolicy())
    assert fetched.source == b"hello"
    assert fetched.name == "data:video/mp4"


def test_data_uri_is_measured_before_it_is_decoded():
    assert fetch(data_uri(bytes(99)), FetchPolicy(max_bytes=99)).size_bytes == 99
    for size in (100, 101, 102, 200_000):
        with pytest.raises(SourceTooLargeError):
            fetch(data_uri(bytes(size)), FetchPolicy(max_bytes=99))


@pytest.mark.parametrize(
    "locator",
    [
        "data:",
        "data:video/mp4,hello",
        "data:video/mp4;base64,a*b=",
        "data:;base64,abc",
        "data:;base64,aGVs bG8=",
        "data:;base64,ü",
    ],
)
def test_malformed_data_uri_is_refused(locator):
    with pytest.raises(FetchError):
        fetch(locator, FetchPolicy())


def test_data_uri_can_be_switched_off():
    with pytest.raises(SourceNotAllowedError):
        fetch(data_uri(b"x"), FetchPolicy(allow_data_uri=False))


def test_kinds_of_locators():
    assert [
        locator_kind(text)
        for text in ("a.mp4", "/x/y", "FILE:///x", "Data:;base64,", "HTTPS://x/y", "s3://b/k", "a:b.mp4")
    ] == [
        "path",
        "path",
        "file",
        "data",
        "http",
        "bucket",
        "path",
    ]


def test_buckets_and_remote_file_uris_are_refused():
    for locator in ("s3://bucket/a.mp4", "gs://bucket/a.mp4", "file://server/share/a.mp4", "file:a.mp4"):
        with pytest.raises(SourceNotAllowedError):
            fetch(locator, FetchPolicy())


def test_media_key_follows_content_of_bytes_and_change_of_files(tmp_path):
    one, two = fetch(data_uri(b"1"), FetchPolicy()), fetch(data_uri(b"2"), FetchPolicy())
    assert media_key(one) == media_key(fetch(data_uri(b"1", "video/webm"), FetchPolicy())) != media_key(two)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"1")
    before = media_key(fetch(str(path), FetchPolicy()))
    assert media_key(fetch(str(path), FetchPolicy())) == before
    os.utime(path, ns=(1, 1))
    assert media_key(fetch(str(path), FetchPolicy())) != before


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


def test_a_folder_with_a_link_out_of_the_roots_is_refused(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "secret.png"
    (inside / "frames").mkdir(parents=True)
    outside.write_bytes(b"x")
    (inside / "frames" / "a.png").symlink_to(outside)
    assert fetch(str(inside / "frames"), FetchPolicy()).size_bytes == 1
    with pytest.raises(SourceNotAllowedError, match="outside the folders"):
        fetch(str(inside / "frames"), FetchPolicy(allow_roots=(inside,)))
