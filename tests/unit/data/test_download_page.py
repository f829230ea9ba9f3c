"""Videos on pages by yt-dlp, through its generic extractor and a server on loopback."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import write_clip
from download_server import Site, serving

from valley_ray.config import validate_config
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.credentials import Credentials
from valley_ray.data.download.page import receive_page
from valley_ray.errors import (
    FetchError,
    FetchTimeoutError,
    ServerBusyError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceRefusedError,
    SourceTooLargeError,
    TransientFetchError,
)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("video") / "a.mp4", seed=3).read_bytes()


@pytest.fixture
def site(video: bytes) -> Iterator[Site]:
    with serving({"a.mp4": video}) as site:
        yield site


def receive(tmp_path: Path, url: str, *, timeout_s: float = 60.0, cookies: str = "", **settings: Any) -> Path:
    values = {"sources": [{"kind": "vatex", "path": "a.json"}], "media_root": tmp_path}
    values |= {"allow_private_addresses": True, "stall_timeout_s": 1.0} | settings
    config = validate_config(DownloadConfig, values, source="test")
    target = tmp_path / "v%d.mp4.page.part"
    receive_page(url, target, config=config, credentials=Credentials(cookies=cookies), timeout_s=timeout_s)
    return target


def test_a_video_is_received_and_resumed(tmp_path: Path, site: Site, video: bytes) -> None:
    cookies = "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tcrumb\n"
    (tmp_path / "v%d.mp4.page.part.part").write_bytes(video[:1000])
    assert receive(tmp_path, site.url("/ok/a.mp4"), cookies=cookies).read_bytes() == video
    assert "bytes=1000-" in site.ranges
    assert {sent.get("Cookie") for _, sent in site.headers} == {"session=crumb"}
    assert [path.name for path in tmp_path.iterdir()] == ["v%d.mp4.page.part"]


@pytest.mark.parametrize(
    ("path", "error_class"),
    [
        ("/404/a.mp4", SourceNotFoundError),
        ("/403/a.mp4", SourceRefusedError),
        ("/503/a.mp4", ServerBusyError),
        ("/cut/1000/a.mp4", TransientFetchError),
        ("/page/a", SourceNotFoundError),
    ],
)
def test_what_fails_is_named(tmp_path: Path, site: Site, path: str, error_class: type[FetchError]) -> None:
    with pytest.raises(error_class, match=r"127\.0\.0\.1") as caught:
        receive(tmp_path, site.url(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v%d.mp4.page.part").exists()


def test_a_silent_server_is_given_up_and_a_slow_one_stopped(tmp_path: Path, site: Site) -> None:
    with pytest.raises(TransientFetchError):
        receive(tmp_path, site.url("/stall/1000/a.mp4"))
    started = time.monotonic()
    with pytest.raises(FetchTimeoutError):
        receive(tmp_path, site.url("/drip/a.mp4"), timeout_s=2.0)
    assert time.monotonic() - started < 10


def test_limits_hold_inside_the_process(tmp_path: Path, site: Site) -> None:
    with pytest.raises(SourceTooLargeError):
        receive(tmp_path, site.url("/ok/a.mp4"), max_bytes=1000)
    with pytest.raises(SourceNotAllowedError, match=r"127\.0\.0\.1, no public address"):
        receive(tmp_path, site.url("/ok/a.mp4"), allow_private_addresses=False)
    with pytest.raises(SourceNotAllowedError, match="allow_hosts"):
        receive(tmp_path, site.url("/ok/a.mp4"), allow_hosts=("example.org",))
