"""A folder of videos and records becomes shards, tables and windows: every clip counted, nothing decoded twice."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import ray
from data_clips import turns, write_clip, write_records
from PIL import Image

from valley_ray.data.commit import exclusive
from valley_ray.data.config import PrepareConfig
from valley_ray.data.execution import decode_blocks, is_node_alive
from valley_ray.data.frame_store import FrameStore
from valley_ray.data.prepare import PrepareSummary, prepare, read_tables
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK, SAMPLES_SCHEMA, check_clips, check_samples
from valley_ray.data.shards import WindowStore
from valley_ray.data.sources import clip_row
from valley_ray.data.stages import BLOCK_SCHEMA, DecodeStage
from valley_ray.errors import DataError, StorageError
from valley_ray.fetch import FetchPolicy
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import SandboxLimits
from valley_ray.processor import ProcessorConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("data_cluster")]

AS_EVER: dict[str, Any] = {"num_cpus": 0.5, "max_tasks": None, "retries": 1, "block_size": 6}
CROPS = {"video_crop": Crop(size=32, short_side=32), "image_crop": Crop(size=32, short_side=32)}


def run(output: Path, *inputs: Path, **values: Any) -> PrepareSummary:
    settings = {"sampling": FrameSampling(num_frames=4), "block_size": 4} | values
    if "model" not in settings:
        settings |= CROPS
    summary = prepare(PrepareConfig(sources=tuple({"path": str(one)} for one in inputs), output=output, **settings))
    written = json.loads((output / "summary.json").read_text())
    assert written["rows_in"] == written["ok"] + written["failed"]
    assert written["repeated_rows"] == 0
    return summary


def block_of(paths: Sequence[Path]) -> pa.Table:
    clips = [clip_row("video", str(path)) for path in paths]
    rows = [{"window": 0, "block": 0} | {key: clip[key] for key in BLOCK_SCHEMA.names[2:]} for clip in clips]
    return pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA)


def stage_of(directory: Path, kind: type[DecodeStage]) -> DecodeStage:
    return kind(
        directory=directory,
        fingerprint="f",
        sampling=FrameSampling(num_frames=2),
        processing=ProcessorConfig(num_patches=4, **CROPS),
        backend="pyav",
        limits=SandboxLimits(),
        policy=FetchPolicy(),
        max_deaths=1,
    )


def ledger(output: Path) -> dict[str, dict[str, Any]]:
    """Rows of clips/ by file name, as anybody reads them."""
    table = check_clips(read_tables(output / "clips", CLIPS_SCHEMA))
    return {Path(row["uri"]).name: row for row in table.to_pylist()}


def test_folder_of_videos_is_decoded_and_grows_by_what_is_new(tmp_path: Path) -> None:
    videos, output = tmp_path / "videos", tmp_path / "out"
    (videos / "more").mkdir(parents=True)
    for index in range(5):
        write_clip(videos / f"{index}.mp4", brightness=20 * index)
    shutil.copy(videos / "3.mp4", videos / "more" / "copy.mp4")
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "page.mp4").write_bytes(b"<html>not a video</html>")
    (videos / "notes.txt").write_text("not a row")
    summary = run(output, videos)
    assert (summary.rows_in, summary.ok, summary.failed, summary.duplicates) == (8, 6, 2, 1)
    assert summary.by_error_class == {"media_empty": 1, "media_not_recognised": 1}
    assert (summary.samples_in, summary.windows_dir) == (0, None)
    rows, store = ledger(output), FrameStore(output / "shards")
    for index in range(5):
        row = rows[f"{index}.mp4"]
        assert store.frames(row["shard"], row["row"])[0].mean() == pytest.approx(20 * index, abs=2)
        assert (row["width"], row["fps"], row["num_frames"]) == (32, 8.0, 4)
    assert rows["3.mp4"]["content_digest"] == rows["copy.mp4"]["content_digest"] != ""
    assert "page.mp4" in rows["page.mp4"]["error"]
    assert b"page.mp4" in (output / "report.html").read_bytes()

    assert run(output, videos).clips_decoded == 0, "all of it is there"
    write_clip(videos / "9.mp4", brightness=180)
    write_clip(videos / "0.mp4", brightness=200)
    grown = run(output, videos)
    assert (grown.rows_in, grown.ok, grown.clips_decoded) == (9, 7, 2), "one is new, one has changed"
    row = ledger(output)["0.mp4"]
    assert store.frames(row["shard"], row["row"])[0].mean() == pytest.approx(200, abs=2)
    with exclusive(output), pytest.raises(DataError, match="choose another output"):
        run(output, videos)


def test_progress_is_told_to_the_dashboard_and_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        write_clip(tmp_path / f"{index}.mp4", brightness=20 * index)
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    run(tmp_path / "out", tmp_path)
    assert re.search(r"4/4 videos  [\d.]+ videos/s  1 failed \(media_not_recognised 1\)\n", capsys.readouterr().err)
    node = ray.nodes()[0]
    expected = [f"ray_valley_data_{name}{{" for name in ("clips_total", "clips_left", "clips_per_second")]
    expected += ["ray_valley_data_block_seconds_bucket{", 'error_class="media_not_recognised"']
    missing, deadline = expected, time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        missing = [text for text in expected if text not in page]
    assert not missing, "the driver's numbers and the workers' come to the page at different times"


def test_failed_clips_are_decoded_again_on_request_only(tmp_path: Path, tiny_valley: Path) -> None:
    write_clip(tmp_path / "a.mp4", brightness=50)
    records = write_records(tmp_path / "r.json", [{"id": "a", "video": "a.mp4", "conversations": turns()}])
    no_time = SandboxLimits(timeout_s=1e-6)
    failed = run(tmp_path / "out", records, model=tiny_valley, sandbox=no_time)
    assert (failed.by_error_class, failed.samples_failed) == ({"decode_timeout": 1}, 1)
    assert run(tmp_path / "out", records, model=tiny_valley).clips_decoded == 0, "quarantined"
    again = run(tmp_path / "out", records, model=tiny_valley, retry_failed=True)
    assert (again.ok, again.samples_ok, again.clips_decoded) == (1, 1, 1)
    later = run(tmp_path / "out", records, model=tiny_valley)
    assert (later.samples_ok, later.clips_decoded, later.windows_dir) == (1, 0, again.windows_dir)


def test_windows_hold_their_frames_and_another_plan_lies_beside_them(tmp_path: Path, tiny_valley: Path) -> None:
    for index in range(8):
        write_clip(tmp_path / f"{index}.mp4", brightness=20 * index)
    records = [{"id": i, "video": f"{i % 8}.mp4", "conversations": turns()} for i in range(20)]
    records += [{"id": "missing", "video": "x.mp4", "conversations": turns()}, {"id": "bad", "conversations": 3}]
    path, output = write_records(tmp_path / "records.json", records), tmp_path / "out"
    (tmp_path / "unseen").mkdir()
    write_clip(tmp_path / "unseen" / "of-nobody.mp4", brightness=222)
    summary = run(output, path, tmp_path / "unseen", model=tiny_valley, window_size=8, seed=1)
    assert (summary.rows_in, summary.ok, summary.failed, summary.clips_decoded) == (10, 9, 1, 10)
    assert (summary.samples_in, summary.samples_ok, summary.samples_failed) == (22, 20, 2)
    assert summary.windows_dir is not None
    clips = read_tables(output / "clips", CLIPS_SCHEMA)
    samples = check_samples(read_tables(output / "samples", SAMPLES_SCHEMA), clips)
    by_id = {row["sample_id"]: row for row in samples.to_pylist()}
    assert [by_id[name]["error_class"] for name in ("3", "missing", "bad")] == [
        "",
        "source_not_found",
        "invalid_conversation",
    ]
    assert by_id["3"]["num_tokens"] > 0
    store = WindowStore(output / summary.windows_dir)
    seen = {one.sample_id: one for manifest in store.committed() for one in store.read(manifest)}
    assert len(seen) == 20
    for name, sample in seen.items():
        assert sample.frames[0][0].mean() == pytest.approx(20 * (int(name) % 8), abs=2)

    other = run(output, path, model=tiny_valley, window_size=8, compact=True)
    assert len(list((output / "shards").glob("*.arrow"))) == 1, "windows of before and of now point into one shard"
    merged, frames = ledger(output)["4.mp4"], FrameStore(output / "shards")
    assert merged["shard"].startswith("merged-")
    assert frames.frames(merged["shard"], merged["row"])[0].mean() == pytest.approx(80, abs=2)
    assert (other.clips_decoded, other.rows_in) == (0, 9)
    assert other.windows_dir != summary.windows_dir
    assert len(list((output / "windows").iterdir())) == 2


def test_rows_that_name_no_file_keep_their_reason_and_folders_of_frames_are_compared(tmp_path: Path) -> None:
    videos, output = tmp_path / "videos", tmp_path / "out"
    for folder in ("one", "two", "other"):
        (videos / folder).mkdir(parents=True)
        for number in range(3):
            level = 60 * number + (folder == "other")
            Image.new("RGB", (40, 40), (level, 0, 0)).save(videos / folder / f"{number}.png")
    table = tmp_path / "clips.csv"
    table.write_text(f"media,start_s,end_s\n{write_clip(tmp_path / 'a.mp4', brightness=9)},,\na.mp4,5,2\n,,\nb.mp4,,\n")
    summary = run(output, videos, table)
    assert (summary.rows_in, summary.ok, summary.duplicates, summary.clips_decoded) == (7, 4, 1, 5)
    assert summary.by_error_class == {"invalid_data": 2, "source_not_found": 1}
    rows = ledger(output)
    assert rows["one"]["content_digest"] == rows["two"]["content_digest"] != rows["other"]["content_digest"]
    bad = rows["clips.csv: row 1"]
    assert (bad["error"], bad["attempts"]) == ("the window ends at 2 s, not after its start at 5 s", 0)
    again = run(output, videos, table, retry_failed=True)
    assert (again.by_error_class, again.clips_decoded) == (summary.by_error_class, 1), "only the missing file is tried"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(28, "Error writing bytes to file. Detail: [errno 28]"), StorageError),
        (DataError("shard-0: its worker died 4 times between two clips; see the worker's log"), DataError),
    ],
)
def test_what_a_worker_raises_on_purpose_is_raised_here(tmp_path: Path, error: Exception, wanted: Any) -> None:
    class Raising(DecodeStage):
        """Local, so that workers get it by value."""

        def _append(self, *_: Any) -> None:
            raise error

    with pytest.raises(wanted, match=r"No space left on device|died 4 times"):
        list(decode_blocks([block_of([tmp_path / "a.mp4"])], stage_of(tmp_path, Raising), **AS_EVER))


def test_nodes_are_told_apart_from_those_that_have_gone() -> None:
    assert is_node_alive(ray.nodes()[0]["NodeID"])
    assert not is_node_alive("0" * 56)


def test_clip_that_kills_its_worker_every_time_fails_alone(tmp_path: Path) -> None:
    class Deadly(DecodeStage):
        """Local, so that workers get it by value."""

        def _frames(self, sources: Any, clip: Any) -> Any:
            if "deadly" in clip["uri"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._frames(sources, clip)

    block = block_of([write_clip(tmp_path / name, brightness=30) for name in ("0.mp4", "deadly.mp4", "1.mp4")])
    [outcomes] = decode_blocks([block], stage_of(tmp_path, Deadly), **AS_EVER)
    assert [outcome["status"] for outcome in outcomes] == [OK, FAILED, OK]
    assert outcomes[1]["error_class"] == "decode_worker_died"
    assert [outcome["attempts"] for outcome in outcomes] == [1, 2, 1]
