"""Shards and windows: written whole, mapped without a copy, waited for without hanging."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from valley_ray.data import commit, schema, shards
from valley_ray.errors import DataError
from valley_ray.media.frames import VideoFrames


def make_frames(seed: int, num_frames: int = 4, side: int = 8) -> VideoFrames:
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, side, side, 3), dtype=np.uint8)
    return VideoFrames(pixels, np.arange(num_frames, dtype=np.float64) / 10)


def clip_values(clip_id: str, status: str = schema.OK, error_class: str = "", error: str = "") -> dict[str, object]:
    return {
        "clip_id": clip_id,
        "status": status,
        "error_class": error_class,
        "error": error,
        "attempts": 1,
        "etag": "e",
        "content_digest": "",
    }


def sample_row(name: str, clips: list[tuple[str, int]], status: str = schema.OK) -> dict[str, object]:
    ok = status == schema.OK
    return {
        "sample_id": name,
        "input_ids": [1, 2, 3] if ok else [],
        "labels": [-100, 2, 3] if ok else [],
        "num_tokens": 3 if ok else 0,
        "num_label_tokens": 2 if ok else 0,
        "clips": [{"shard": shard, "row": row} for shard, row in clips],
        "status": status,
        "error_class": "" if ok else "media_corrupt",
        "error": "" if ok else "broken",
    }


def write_window(directory: Path, index: int, rows: list[dict[str, object]], *, is_last: bool = False) -> None:
    num_ok = sum(row["status"] == schema.OK for row in rows)
    manifest = shards.WindowManifest(
        index=index,
        first_position=index * len(rows),
        num_samples=len(rows),
        num_ok=num_ok,
        num_failed=len(rows) - num_ok,
        num_tokens=3 * num_ok,
        num_label_tokens=2 * num_ok,
        num_clips=0,
        by_error_class={},
        shards=("shard-a.arrow",),
        fingerprint="f",
        is_last=is_last,
    )
    samples = pa.Table.from_pylist(rows, schema=schema.WINDOW_SCHEMA)
    commit.commit_window(directory, manifest, samples, schema.CLIPS_SCHEMA.empty_table())


def write_shard(directory: Path) -> list[VideoFrames]:
    clips = [make_frames(0), make_frames(1, num_frames=1), make_frames(2)]
    with commit.ShardWriter(directory, "shard-a.arrow", fingerprint="f") as writer:
        assert writer.append(clip_values("c0"), clips[0]) == 0
        assert writer.append(clip_values("bad", schema.FAILED, "media_corrupt", "no frames"), None) == 1
        assert writer.append(clip_values("c1"), clips[1]) == 2
        assert writer.append(clip_values("c2"), clips[2]) == 3
    return clips


def test_window_gives_back_samples_and_frames_without_copying(tmp_path: Path) -> None:
    clips = write_shard(tmp_path)
    write_window(tmp_path, 0, [sample_row("s0", [("shard-a.arrow", 3), ("shard-a.arrow", 2)]), sample_row("s1", [])])
    store = shards.WindowStore(tmp_path)
    [manifest] = store.committed()
    window = store.read(manifest)
    sample = window[0]
    assert sample.sample_id == "s0"
    assert sample.input_ids.dtype == np.int64
    assert sample.input_ids.tolist() == [1, 2, 3]
    assert sample.labels.tolist() == [-100, 2, 3]
    assert sample.num_label_tokens == 2
    assert np.array_equal(sample.frames[0], clips[2].frames_THWC)
    assert np.array_equal(sample.frames[1], clips[1].frames_THWC), "one frame beside four in the same shard"
    again = window[0].frames[0]
    assert np.shares_memory(sample.frames[0], again), "both are views into one map"
    assert not again.flags.owndata
    assert not again.flags.writeable
    assert window[1].frames == ()


def test_views_outlive_the_store_that_made_them(tmp_path: Path) -> None:
    clips = write_shard(tmp_path)
    view = shards.WindowStore(tmp_path).frames("shard-a.arrow", 0)
    assert np.array_equal(view, clips[0].frames_THWC)


def test_shard_keeps_failed_clips_as_rows_with_a_reason(tmp_path: Path) -> None:
    write_shard(tmp_path)
    fingerprint, records = shards.read_shard_records(tmp_path / "shard-a.arrow")
    assert fingerprint == "f"
    assert [record["status"] for record in records] == ["ok", "failed", "ok", "ok"]
    assert records[1]["error"] == "no frames"
    assert records[1]["num_frames"] == 0
    assert "frames" not in records[0]


def test_shard_of_an_interrupted_writer_does_not_appear(tmp_path: Path) -> None:
    def interrupted() -> None:
        with commit.ShardWriter(tmp_path, "shard-a.arrow", fingerprint="f") as writer:
            writer.append(clip_values("c0"), make_frames(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_failed_sample_keeps_its_place_and_is_not_handed_out(tmp_path: Path) -> None:
    write_window(tmp_path, 0, [sample_row("s0", [], schema.FAILED), sample_row("s1", [])])
    store = shards.WindowStore(tmp_path)
    window = store.read(store.committed()[0])
    assert window.is_ok.tolist() == [False, True]
    assert [sample.sample_id for sample in window] == ["s1"]
    with pytest.raises(DataError, match="media_corrupt: broken"):
        window[0]


def test_windows_appear_one_after_the_other_and_only_with_their_marker(tmp_path: Path) -> None:
    store = shards.WindowStore(tmp_path)
    assert store.committed() == []
    write_window(tmp_path, 0, [sample_row("s0", [])])
    assert [m.index for m in store.committed()] == [0]
    write_window(tmp_path, 1, [sample_row("s1", [])], is_last=True)
    (tmp_path / "window-00001.json").rename(tmp_path / "hidden")
    assert [m.index for m in store.committed()] == [0]
    (tmp_path / "hidden").rename(tmp_path / "window-00001.json")
    assert [m.index for m in store.committed()] == [0, 1]
    with pytest.raises(DataError, match="ends with window 1"):
        store.wait(2, timeout_s=5)


def test_waiting_reader_wakes_when_its_window_is_committed(tmp_path: Path) -> None:
    store = shards.WindowStore(tmp_path)
    writer = threading.Timer(0.2, write_window, (tmp_path, 0, [sample_row("s0", [])]))
    writer.start()
    assert store.wait(0, timeout_s=10, poll_s=0.01).index == 0
    writer.join()


def test_waiting_reader_stops_with_the_reason_of_the_producer(tmp_path: Path) -> None:
    write_window(tmp_path, 0, [sample_row("s0", [])])
    commit.mark_failed(tmp_path, DataError("the disk is full"))
    store = shards.WindowStore(tmp_path)
    assert store.wait(0, timeout_s=5).index == 0, "what was committed before the failure stays readable"
    with pytest.raises(DataError, match="invalid_data: the disk is full"):
        store.wait(1, timeout_s=5)
    commit.clear_failure(tmp_path)
    with pytest.raises(DataError, match="not committed within"):
        store.wait(1, timeout_s=0.05)


def test_waiting_reader_can_be_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DataError, match="stopped"):
        shards.WindowStore(tmp_path).wait(0, timeout_s=60, stop=stop)


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard-a.arrow").write_bytes(b"not an arrow file")
    with pytest.raises(DataError, match=r"shard-a\.arrow"):
        shards.WindowStore(tmp_path).frames("shard-a.arrow", 0)
