"""Locators become files or bytes inside the policy, and nothing else."""

import base64
import os
from pathlib import Path

import pytest

from valley_ray.errors import (
    FetchError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceTooLargeError,
)
from valley_ray.fetch import FetchPolicy, fetch, locator_kind, media_key


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


def test_a_folder_with_a_link_out_of_the_roots_is_refused(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "secret.png"
    (inside / "frames").mkdir(parents=True)
    outside.write_bytes(b"x")
    (inside / "frames" / "a.png").symlink_to(outside)
    assert fetch(str(inside / "frames"), FetchPolicy()).size_bytes == 1
    with pytest.raises(SourceNotAllowedError, match="outside the folders"):
        fetch(str(inside / "frames"), FetchPolicy(allow_roots=(inside,)))
