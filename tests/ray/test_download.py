"""Downloads on a local cluster: every row accounted for, limits held over workers, nothing fetched twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from clips import write_clip
from download_server import Site, serving

from valley_ray.config import validate_config
from valley_ray.data.commit import exclusive
from valley_ray.data.download import run as download_run
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.ledger import LEDGER_SCHEMA
from valley_ray.data.download.results import DownloadSummary
from valley_ray.data.download.run import run_downloads
from valley_ray.data.schema import FAILED, OK, PENDING, check_clips
from valley_ray.errors import DataError, StorageError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
FAST = {"retry": {"backoff_s": 0.05, "max_attempts": 3}, "host_limits": {"concurrency": 8, "requests_per_s": 1000}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    return {f"{i}.mp4": write_clip(folder / f"{i}.mp4", seed=i).read_bytes() for i in range(4)}


@pytest.fixture
def site(contents: dict[str, bytes]) -> Iterator[Site]:
    with serving(contents) as site:
        yield site


def make_config(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DownloadConfig:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    values = {"sources": [{"kind": "urls", "path": path}], "media_root": tmp_path / "media"} | FAST
    values |= {"allow_private_addresses": True, "stall_timeout_s": 0.5} | settings
    return validate_config(DownloadConfig, values, source="test")


def run(config: DownloadConfig) -> tuple[DownloadSummary, list[dict[str, Any]]]:
    summary = run_downloads(config)
    table = pq.read_table(config.ledger_folder / "ledger.parquet")
    assert table.schema.equals(LEDGER_SCHEMA)
    clips = check_clips(pq.read_table(config.ledger_folder / "clips.parquet"))
    assert set(clips["status"].to_pylist()) <= {PENDING, FAILED}
    assert json.loads((config.ledger_folder / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert not (config.ledger_folder / "journal.jsonl").exists()
    return summary, table.to_pylist()


def test_good_and_bad_rows_all_end_and_the_next_run_asks_for_nothing(
    tmp_path: Path, site: Site, contents: dict[str, bytes]
) -> None:
    behaviours = {
        "ok/1/0.mp4": OK,
        "busy/500/1/-/1.mp4": OK,
        "busy/429/1/1/2.mp4": OK,
        "cut/1200/3.mp4": OK,
        "unsaid/0.mp4": OK,
        "500/a.mp4": "server_busy",
        "404/a.mp4": "source_not_found",
        "403/a.mp4": "source_refused",
        "html/a.mp4": "media_not_recognised",
        "stall/100/1.mp4": "fetch_timeout",
        "says-more/1.mp4": "fetch_interrupted",
        "loop/a": "fetch_failed",
    }
    rows = [{"url": site.url(f"/{path}"), "id": path} for path in behaviours]
    rows += [{"url": site.url("/ok/1/0.mp4"), "id": "again"}, {"url": "nonsense", "id": "bad"}]
    config = make_config(tmp_path, rows)
    summary, ledger = run(config)
    assert {row["row_id"]: row["error_class"] or row["status"] for row in ledger} == behaviours | {
        "again": OK,
        "bad": "invalid_data",
    }
    assert (summary.rows_in, summary.ok, summary.failed, summary.duplicate_rows) == (14, 6, 8, 1)
    assert sum(summary.by_error_class.values()) == 8
    attempts = {row["row_id"]: row["attempts"] for row in ledger}
    assert site.asked["/ok/1/0.mp4"] == 1, "rows of one URL share its download"
    assert site.asked["/404/a.mp4"] == site.asked["/403/a.mp4"] == 1, "what cannot pass is not asked for again"
    assert attempts["500/a.mp4"] == site.asked["/500/a.mp4"] == 3
    assert attempts["busy/429/1/1/2.mp4"] == attempts["cut/1200/3.mp4"] == 2
    media = {path.name for path in config.media_root.iterdir() if path.is_file()}
    assert len([name for name in media if not name.endswith((".part", ".part.json"))]) == 5
    for row in ledger:
        if row["status"] == OK:
            assert (config.media_root / row["path"]).read_bytes() == contents[Path(row["url"]).name]
            assert row["size_bytes"] == len(contents[Path(row["url"]).name])

    before = site.asked.total()
    summary, again = run(config)
    assert site.asked.total() == before, "finished rows are taken over, failed ones too"
    assert again == ledger
    assert (summary.files_taken_over, summary.files_fetched) == (12, 0)
    (config.media_root / ledger[0]["path"]).unlink()
    summary, _ = run(make_config(tmp_path, rows, retry_failed=True))
    assert site.asked["/ok/1/0.mp4"] == 2, "a file that went away is fetched again"
    assert site.asked["/404/a.mp4"] == 2
    assert (summary.ok, summary.failed, summary.files_fetched) == (6, 8, 1)


def test_limits_of_a_host_hold_over_all_workers(tmp_path: Path, site: Site) -> None:
    rows = [{"url": site.url(f"/slow/0.1/{i}/{i % 4}.mp4")} for i in range(24)]
    limits = {"concurrency": 3, "requests_per_s": 20.0}
    config = make_config(tmp_path, rows, num_workers=2, host_limits=limits)
    summary, _ = run(config)
    assert summary.ok == 24
    assert site.most_open == 3
    assert site.times[-1] - site.times[0] > 0.9 * 23 / 20


def test_windows_of_vatex_share_a_video_and_become_clips(tmp_path: Path, site: Site) -> None:
    site.contents |= {"aaaaaaaaaaa.mp4": site.contents["0.mp4"]}
    names = ["aaaaaaaaaaa_000000_000001", "aaaaaaaaaaa_000001_000002", "bbbbbbbbbbb_000000_000010"]
    path = tmp_path / "vatex.json"
    path.write_text(json.dumps([{"videoID": name} for name in names]))
    source = {"kind": "vatex", "path": path, "page_url": site.url("/ok/{id}.mp4"), "folder": "VATEX"}
    config = make_config(tmp_path, [], sources=[source])
    site.contents.pop("bbbbbbbbbbb.mp4", None)
    summary, ledger = run(config)
    assert (summary.ok, summary.failed, summary.num_files) == (2, 1, 2)
    clips = pq.read_table(summary.clips).to_pylist()
    assert [(clip["start_s"], clip["end_s"], clip["status"]) for clip in clips] == [
        (0.0, 1.0, PENDING),
        (1.0, 2.0, PENDING),
        (0.0, 10.0, FAILED),
    ]
    assert clips[0]["uri"] == clips[1]["uri"] == str(config.media_root / "VATEX" / "v_aaaaaaaaaaa.mp4")
    assert ledger[2]["error_class"] == clips[2]["error_class"] != ""


def test_a_worker_that_dies_costs_no_row(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"url": site.url(f"/wait/{i}/{i % 4}.mp4")} for i in range(16)]
    config = make_config(tmp_path, rows, num_workers=2, stall_timeout_s=50)
    killed: list[int] = []

    def kill_one(line: str) -> None:
        """A worker whose requests the server has taken in and holds back until it is dead."""
        ours = psutil.Process().children(recursive=True)
        workers = [one for one in ours if "DownloadWorker" in "".join(one.cmdline())]
        asking = {one.pid: _connections(one, site.server_port) for one in workers}
        if not killed and site.now_open and sum(asking.values()) == site.now_open:
            killed.append(max(asking, key=lambda pid: asking[pid]))
            os.kill(killed[0], signal.SIGKILL)
            site.released.set()

    monkeypatch.setattr(download_run, "_PROGRESS_EVERY_S", 0.2)
    summary = run_downloads(config, on_progress=kill_one)
    assert killed
    assert (summary.rows_in, summary.ok) == (16, 16), summary.examples
    assert max(site.asked.values()) == 2, "what was under way there was begun again"


def _connections(process: psutil.Process, port: int) -> int:
    return sum(bool(one.raddr) and one.raddr.port == port for one in process.net_connections(kind="tcp"))


def test_a_full_disk_ends_the_run_with_one_line_and_the_next_goes_on(tmp_path: Path, site: Site) -> None:
    rows = [{"url": site.url(f"/ok/{i}/{i}.mp4"), "name": f"{i}.mp4"} for i in range(4)]
    config = make_config(tmp_path, rows, host_limits={"concurrency": 1, "requests_per_s": 100})
    config.media_root.mkdir()
    os.symlink("/dev/full", config.media_root / "2.mp4.part")
    with pytest.raises(StorageError, match="is full; make room") as caught:
        run_downloads(config)
    assert "\n" not in str(caught.value)
    (config.media_root / "2.mp4.part").unlink()
    summary, _ = run(config)
    assert (summary.ok, summary.files_taken_over) == (4, 2)
    assert Counter(site.asked.values())[1] >= 3


def test_one_ledger_has_one_writer(tmp_path: Path, site: Site) -> None:
    config = make_config(tmp_path, [{"url": site.url("/ok/0.mp4")}])
    config.ledger_folder.mkdir(parents=True)
    with exclusive(config.ledger_folder), pytest.raises(DataError, match="choose another media_root or ledger_dir"):
        run_downloads(config)


def test_a_row_that_contradicts_another_does_not_speak_for_their_url(tmp_path: Path, site: Site) -> None:
    rows = [{"url": site.url("/ok/0.mp4"), "size_bytes": len(site.contents["0.mp4"])}]
    rows += [{"url": site.url("/ok/0.mp4"), "size_bytes": 1}]
    for _ in range(2):
        summary, ledger = run(make_config(tmp_path, rows))
        assert [row["status"] for row in ledger] == [OK, FAILED]
    assert summary.files_taken_over == 1
    added, ledger = run(make_config(tmp_path, [{"url": site.url("/ok/1.mp4")}]))
    assert (added.rows_in, added.ok) == (1, 1)
    assert [row["status"] for row in ledger] == [OK, FAILED, OK], "rows of earlier lists are kept"


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_driver_is_continued_without_asking_again(
    tmp_path: Path, site: Site, contents: dict[str, bytes]
) -> None:
    num_bytes = len(contents["3.mp4"])
    rows = [{"url": site.url(f"/ok/{i}/{i % 4}.mp4"), "id": f"{i}"} for i in range(20)]
    rows += [{"url": site.url(f"/404/{i}.mp4"), "id": f"gone-{i}"} for i in range(3)]
    rows += [{"url": site.url(f"/stall/{num_bytes - 100}/3.mp4"), "id": "half"}]
    rows += [{"url": site.url(f"/wait/{i}/0.mp4"), "id": f"wait-{i}"} for i in range(2)]
    limits = {"host_limits": {"concurrency": 4, "requests_per_s": 1000}, "stall_timeout_s": 30}
    config = make_config(tmp_path, rows, **limits)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "download.py"), str(tmp_path / "config.json")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until(lambda: site.asked["/wait/1/0.mp4"] == 1 and _num_recorded(config) == 23, driver)
    finally:
        driver.kill()
        driver.wait()
    asked = Counter(site.asked)
    site.released.set()
    summary, ledger = run(config)
    assert (summary.rows_in, summary.ok, summary.failed, summary.files_taken_over) == (26, 23, 3, 23)
    for path in asked:
        if path.startswith(("/ok/", "/404/")):
            assert site.asked[path] == 1, f"{path} was finished, and asked for again"
    half = next(row for row in ledger if row["row_id"] == "half")
    assert site.ranges == [f"bytes={num_bytes - 100}-"], "what had arrived was not fetched again"
    assert (config.media_root / half["path"]).read_bytes() == contents["3.mp4"]


def _num_recorded(config: DownloadConfig) -> int:
    table, journal = config.ledger_folder / "ledger.parquet", config.ledger_folder / "journal.jsonl"
    num_journaled = len(journal.read_text().splitlines()) if journal.exists() else 0
    statuses = pq.read_table(table)["status"].to_pylist() if table.exists() else []
    return num_journaled + len(statuses) - statuses.count(PENDING)


def _until(is_so: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        assert driver.poll() is None, f"the job ended by itself with status {driver.returncode}"
        time.sleep(0.05)
