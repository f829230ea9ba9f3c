"""One attempt at one file, against a server that stalls, cuts, lies and redirects: only whole videos get their name."""

import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import write_clip
from download_server import Site, serving
from PIL import Image

from valley_ray.config import validate_config
from valley_ray.data.download.attempt import Downloader, Outcome
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.credentials import read_credentials
from valley_ray.data.download.partial import open_partial, part_of
from valley_ray.data.download.sources import Row
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.errors import StorageError
from valley_ray.media.sandbox import Sandbox


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("video") / "a.mp4", seed=3).read_bytes()


@pytest.fixture
def site(video: bytes) -> Iterator[Site]:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    with serving({"a.mp4": video, "picture.mp4": picture.getvalue()}) as site:
        yield site


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


class Fetcher:
    """Attempts at files of a site, into a folder."""

    def __init__(self, root: Path, site: Site, sandbox: Sandbox, **settings: Any) -> None:
        source = {"kind": "urls", "path": root / "list.txt"} | settings.pop("source", {})
        values = {"sources": [source], "media_root": root / "media", "allow_private_addresses": True} | settings
        config = validate_config(DownloadConfig, values, source="test")
        self.site, self.root, self.timeout_s = site, root / "media", config.timeout_s
        self.downloader = Downloader(config, [read_credentials(one) for one in config.sources], sandbox)

    def fetch(self, asked: str, *, adopt: bool = False, **row: Any) -> Outcome:
        wanted = {"row_id": "1", "source": "list.txt", "source_index": 0, "url": self.site.url(asked), "path": "v.mp4"}
        return self.downloader.attempt(Row(**(wanted | row)), timeout_s=self.timeout_s, adopt=adopt)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def fetcher(tmp_path: Path, site: Site, sandbox: Sandbox) -> Fetcher:
    return Fetcher(tmp_path, site, sandbox)


def test_a_video_is_put_in_place_with_its_size_and_digest(fetcher: Fetcher, video: bytes) -> None:
    digest = hashlib.sha256(video).hexdigest()
    outcome = fetcher.fetch("/ok/a.mp4", path="deep/v.mp4", sha256=digest, size_bytes=len(video))
    assert (outcome.status, outcome.attempts, outcome.size_bytes, outcome.sha256) == (OK, 1, len(video), digest)
    assert outcome.etag == '"1"'
    assert outcome.seconds > 0
    assert fetcher.files() == {"v.mp4": video}


@pytest.mark.parametrize(
    ("path", "error_class", "words"),
    [
        ("/404/a.mp4", "source_not_found", "status 404"),
        ("/410/a.mp4", "source_not_found", "status 410"),
        ("/403/a.mp4", "source_refused", "status 403"),
        ("/html/a.mp4", "media_not_recognised", "not a video"),
        ("/ok/nothing.mp4", "media_empty", ""),
        ("/ok/picture.mp4", "media_not_recognised", "an image"),
        ("/says-less/a.mp4", "media_truncated", ""),
        ("/loop/a", "fetch_failed", "redirects"),
        ("/to/a?ftp://127.0.0.1/a.mp4", "source_not_allowed", "ftp"),
    ],
)
def test_what_cannot_pass_fails_at_once_and_leaves_nothing(
    fetcher: Fetcher, path: str, error_class: str, words: str
) -> None:
    outcome = fetcher.fetch(path)
    assert (outcome.status, outcome.error_class) == (FAILED, error_class)
    assert words in outcome.error
    assert "\n" not in outcome.error
    assert fetcher.files() == {}


@pytest.mark.parametrize(
    ("path", "error_class", "retry_after_s"),
    [
        ("/500/a.mp4", "server_busy", None),
        ("/busy/503/9/-/a.mp4", "server_busy", None),
        ("/busy/429/9/17/a.mp4", "server_busy", 17.0),
        ("/busy/429/9/soon/a.mp4", "server_busy", None),
        ("/says-more/a.mp4", "fetch_interrupted", None),
        ("/cut/100/a.mp4", "fetch_interrupted", None),
        ("/unsaid/a.mp4", "fetch_interrupted", None),
    ],
)
def test_what_may_pass_stays_pending(
    fetcher: Fetcher, path: str, error_class: str, retry_after_s: float | None
) -> None:
    outcome = fetcher.fetch(path)
    assert (outcome.status, outcome.error_class, outcome.retry_after_s) == (PENDING, error_class, retry_after_s)
    assert "v.mp4" not in fetcher.files()


def test_a_silent_server_is_given_up(tmp_path: Path, site: Site, sandbox: Sandbox) -> None:
    fetcher = Fetcher(tmp_path, site, sandbox, stall_timeout_s=0.3)
    started = time.monotonic()
    outcome = fetcher.fetch("/stall/1000/a.mp4")
    assert (outcome.status, outcome.error_class) == (PENDING, "fetch_timeout")
    assert "nothing for 0.3 s" in outcome.error
    assert time.monotonic() - started < 5
    assert len(fetcher.files()["v.mp4.part"]) == 1000, "what came is kept for the next attempt"


def test_a_dripping_server_is_cut_off_in_time(tmp_path: Path, site: Site, sandbox: Sandbox) -> None:
    outcome = Fetcher(tmp_path, site, sandbox, timeout_s=0.5).fetch("/drip/a.mp4")
    assert (outcome.status, outcome.error_class) == (PENDING, "fetch_timeout")
    assert outcome.seconds < 5


def test_attempts_resume_where_the_one_before_ended(fetcher: Fetcher, video: bytes) -> None:
    step = len(video) // 3 + 1
    assert [fetcher.fetch(f"/cut/{step}/a.mp4").status for _ in range(3)] == [PENDING, PENDING, OK]
    assert fetcher.site.ranges == [f"bytes={step}-", f"bytes={2 * step}-"]
    assert fetcher.files() == {"v.mp4": video}


def test_a_whole_partial_file_is_not_fetched_again(fetcher: Fetcher, video: bytes) -> None:
    fetcher.fetch("/cut/100/a.mp4")
    part_of(fetcher.root / "v.mp4").write_bytes(video)
    assert fetcher.fetch("/cut/100/a.mp4").status == OK
    assert fetcher.site.ranges == [f"bytes={len(video)}-"]


@pytest.mark.parametrize("behaviour", ["cut-plain", "cut-changed"])
def test_bytes_that_may_have_changed_are_fetched_from_the_start(fetcher: Fetcher, video: bytes, behaviour: str) -> None:
    assert [fetcher.fetch(f"/{behaviour}/700/a.mp4").status for _ in range(2)] == [PENDING, OK]
    assert fetcher.files() == {"v.mp4": video}
    assert fetcher.site.ranges == []


def test_a_range_that_was_not_asked_for_is_not_appended(fetcher: Fetcher, video: bytes) -> None:
    outcomes = [fetcher.fetch("/wrong-range/700/a.mp4") for _ in range(3)]
    assert [outcome.status for outcome in outcomes] == [PENDING, PENDING, OK]
    assert "another range than asked" in outcomes[1].error
    assert fetcher.files() == {"v.mp4": video}


def test_a_partial_file_of_another_url_is_not_continued(fetcher: Fetcher, video: bytes) -> None:
    fetcher.fetch("/cut/700/other.mp4")
    part_of(fetcher.root / "v.mp4").write_bytes(b"other bytes")
    assert fetcher.fetch("/ok/a.mp4").status == OK
    assert fetcher.files() == {"v.mp4": video}


def test_a_resumed_file_that_does_not_pass_is_fetched_from_the_start(fetcher: Fetcher, video: bytes) -> None:
    fetcher.fetch("/cut-once/700/a.mp4")
    part_of(fetcher.root / "v.mp4").write_bytes(b"x" * (len(video) - 10))
    outcome = fetcher.fetch("/cut-once/700/a.mp4")
    assert (outcome.status, outcome.error_class) == (PENDING, "fetch_interrupted")
    assert fetcher.files() == {}
    assert fetcher.fetch("/cut-once/700/a.mp4").status == OK
    assert fetcher.site.ranges == [f"bytes={len(video) - 10}-"]


def test_a_cut_body_of_unsaid_length_is_fetched_again(fetcher: Fetcher, video: bytes) -> None:
    assert [fetcher.fetch("/unsaid/a.mp4").status for _ in range(2)] == [PENDING, OK]


def test_other_bytes_than_the_list_says_are_refused(fetcher: Fetcher, video: bytes) -> None:
    for wrong in ({"sha256": "0" * 64}, {"size_bytes": len(video) + 1}):
        outcome = fetcher.fetch("/ok/a.mp4", **wrong)
        assert (outcome.status, outcome.error_class) == (FAILED, "content_mismatch")
    assert fetcher.files() == {}


def test_too_large_files_are_refused(tmp_path: Path, site: Site, sandbox: Sandbox) -> None:
    fetcher = Fetcher(tmp_path, site, sandbox, max_bytes=1000)
    for path in ("/ok/a.mp4", "/unsaid/a.mp4"):
        assert fetcher.fetch(path).error_class == "source_too_large"
    assert fetcher.files() == {}


def test_private_addresses_are_refused_redirects_included(tmp_path: Path, site: Site, sandbox: Sandbox) -> None:
    fetcher = Fetcher(tmp_path, site, sandbox, allow_private_addresses=False)
    assert fetcher.fetch("/ok/a.mp4").error_class == "source_not_allowed"
    assert not site.asked
    open_to_hosts = Fetcher(tmp_path, site, sandbox, allow_hosts=("127.0.0.1",))
    elsewhere = site.url("/ok/a.mp4").replace("127.0.0.1", "localhost")
    assert open_to_hosts.fetch(f"/to/a?{elsewhere}").error_class == "source_not_allowed"
    assert open_to_hosts.fetch(f"/to/a?{site.url('/ok/a.mp4')}").status == OK


def test_a_full_disk_is_one_clear_error(fetcher: Fetcher) -> None:
    part = part_of(fetcher.root / "v.mp4")
    part.parent.mkdir(parents=True)
    os.symlink("/dev/full", part)
    with pytest.raises(StorageError, match=r"the disk of .* is full; make room"):
        fetcher.fetch("/ok/a.mp4")


def test_two_writers_do_not_share_a_partial_file(fetcher: Fetcher) -> None:
    with open_partial(part_of(fetcher.root / "v.mp4")):
        outcome = fetcher.fetch("/ok/a.mp4")
    assert (outcome.status, outcome.error_class) == (PENDING, "fetch_interrupted")
    assert fetcher.fetch("/ok/a.mp4").status == OK


def test_a_file_that_is_there_and_passes_is_not_fetched(fetcher: Fetcher, video: bytes) -> None:
    fetcher.root.mkdir()
    (fetcher.root / "v.mp4").write_bytes(video)
    outcome = fetcher.fetch("/ok/a.mp4", adopt=True)
    assert (outcome.status, outcome.attempts, outcome.size_bytes) == (OK, 0, len(video))
    assert not fetcher.site.asked
    (fetcher.root / "v.mp4").write_bytes(video[:1000])
    assert fetcher.fetch("/ok/a.mp4", adopt=True).attempts == 1
    assert fetcher.files() == {"v.mp4": video}


API = {"kind": "categories", "file_url_key": "data.0.url", "api_method": "POST"}


def test_an_api_names_the_file(tmp_path: Path, site: Site, sandbox: Sandbox, video: bytes) -> None:
    fetcher = Fetcher(tmp_path, site, sandbox, source=API | {"api_url": site.url("/api/{id}")})
    outcome = fetcher.fetch("/api/a", method="api")
    assert (outcome.status, outcome.num_requests) == (OK, 2)
    for name, error_class in (("gone", "source_not_found"), ("empty", "fetch_failed"), ("number", "fetch_failed")):
        outcome = fetcher.fetch(f"/api/{name}", method="api", path=f"{name}.mp4")
        assert (outcome.status, outcome.error_class) == (FAILED, error_class)
    assert "file_url_key='data.0.url'" in outcome.error


def test_headers_stay_with_their_host_and_cookies_with_their_domain(
    tmp_path: Path, site: Site, sandbox: Sandbox
) -> None:
    (tmp_path / "headers.txt").write_text("# mine\nX-Key: secret\nUser-Agent: me\n")
    cookie = "127.0.0.1\tFALSE\t/ok\tFALSE\t0\tsession\tcrumb\n"
    (tmp_path / "cookies.txt").write_text(f"# Netscape HTTP Cookie File\n{cookie}")
    files = {"headers_file": tmp_path / "headers.txt", "cookies_file": tmp_path / "cookies.txt"}
    fetcher = Fetcher(tmp_path, site, sandbox, source=files)
    elsewhere = site.url("/ok/a.mp4").replace("127.0.0.1", "localhost")
    assert fetcher.fetch("/ok/a.mp4").status == OK
    assert fetcher.fetch(f"/to/a?{elsewhere}").status == OK
    seen = [(path, sent.get("X-Key"), sent.get("User-Agent"), sent.get("Cookie")) for path, sent in site.headers]
    assert seen == [
        ("/ok/a.mp4", "secret", "me", "session=crumb"),
        ("/to/a", "secret", "me", None),
        ("/ok/a.mp4", None, "valley-ray", None),
    ]
    assert "secret" not in repr(read_credentials(fetcher.downloader._config.sources[0]))
