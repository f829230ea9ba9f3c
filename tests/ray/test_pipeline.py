"""The data pipeline on a local cluster: every row accounted for, nothing done twice, bad files harm nobody else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_clips import turns, write_clip, write_records
from PIL import Image

from valley_ray.benchmarks.prepare_cost import second_epoch_decodes
from valley_ray.data.commit import exclusive
from valley_ray.data.pipeline import PipelineConfig, run_pipeline
from valley_ray.data.shards import FAILED_FILE, Window, WindowManifest, WindowStore
from valley_ray.errors import DataError
from valley_ray.media.sampling import FrameSampling

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("data_cluster")]


def make_config(tmp_path: Path, model: Path, records: list[dict[str, Any]], **values: Any) -> PipelineConfig:
    settings = {"window_size": 8, "block_size": 4, "windows_dir": tmp_path / "windows"} | values
    path = write_records(tmp_path / "records.json", records)
    return PipelineConfig(records=(path,), media_root=tmp_path, model=model, **settings)


def read_all(config: PipelineConfig) -> list[Window]:
    store = WindowStore(config.windows_dir)
    return [store.read(manifest) for manifest in store.committed()]


def sample_ids(windows: list[Window]) -> list[str]:
    return [name for window in windows for name in window.table["sample_id"].to_pylist()]


def num_rows_in_shards(config: PipelineConfig) -> int:
    store = WindowStore(config.windows_dir)
    ids = [name for m in store.committed() for name in store.clips(m)["clip_id"].to_pylist()]
    assert len(ids) == len(set(ids)), "each clip is decided in one window"
    return len(ids)


def test_samples_come_in_the_given_order_with_the_frames_of_their_clips(tmp_path: Path, tiny_valley: Path) -> None:
    records: list[dict[str, Any]] = []
    for index in range(6):
        write_clip(tmp_path / f"{index}.mp4", brightness=20 * index)
        records.append({"id": f"video-{index}", "video": f"{index}.mp4", "conversations": turns()})
    Image.new("RGB", (48, 32), (250, 250, 250)).save(tmp_path / "image.png")
    records.append({"id": "image", "image": "image.png", "conversations": turns("<image>\nWhich colour?")})
    records.append({"id": "text", "conversations": turns("How many?")})
    records += [{"id": f"again-{i}", "video": "3.mp4", "conversations": turns()} for i in range(8)]
    records.append({"id": "two", "video": ["5.mp4", "0.mp4"], "conversations": turns("<video> or <video>?")})
    config = make_config(tmp_path, tiny_valley, records, window_size=5, block_size=2)
    order = np.random.default_rng(1).permutation(len(records))
    seen: list[WindowManifest] = []
    summary = run_pipeline(config, order=lambda num_samples: order[:num_samples], on_window=seen.append)
    assert (summary.rows_in, summary.ok, summary.failed) == (17, 17, 0)
    assert summary.num_clips == summary.clips_decoded == num_rows_in_shards(config) == 7
    windows = read_all(config)
    assert sample_ids(windows) == [records[row]["id"] for row in order]
    assert [manifest.is_last for manifest in seen] == [False, False, False, True]
    assert [manifest.first_position for manifest in seen] == [0, 5, 10, 15]
    brightness = {f"video-{i}": [20 * i] for i in range(6)} | {f"again-{i}": [60] for i in range(8)}
    brightness |= {"image": [250], "text": [], "two": [100, 0]}
    for window in windows:
        for sample in window:
            assert [float(clip[0].mean()) for clip in sample.frames] == pytest.approx(
                brightness[sample.sample_id], abs=2
            )
            assert {clip.shape[1:] for clip in sample.frames} <= {(32, 32, 3)}
            assert [len(clip) for clip in sample.frames] == (
                [1] if sample.sample_id == "image" else [4] * len(sample.frames)
            )


def test_500_rows_with_bad_files_are_all_accounted_for_across_an_interruption(
    tmp_path: Path, tiny_valley: Path
) -> None:
    contents = [write_clip(tmp_path / "content.mp4", brightness=4 * i).read_bytes() for i in range(50)]
    bad = {0: b"", 1: b"<html>not a video</html>", 2: contents[0][: len(contents[0]) // 2]}
    is_bad = {row: row // 33 % 3 for row in range(0, 480, 33)}
    for row in range(480):
        content = bad[is_bad[row]] if row in is_bad else contents[row % 50]
        (tmp_path / f"{row}.mp4").write_bytes(content)
    records: list[dict[str, Any]] = [{"id": row, "video": f"{row}.mp4", "conversations": turns()} for row in range(480)]
    records += [{"id": f"shared-{i}", "video": f"{i % 2}.mp4", "conversations": turns()} for i in range(18)]
    records += [{"id": "missing", "video": "nowhere.mp4", "conversations": turns()}, {"conversations": turns()}]
    config = make_config(tmp_path, tiny_valley, records, window_size=64, block_size=16, seed=0)

    def interrupt(manifest: WindowManifest) -> None:
        if manifest.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, on_window=interrupt)
    store = WindowStore(config.windows_dir)
    assert len(store.committed()) == 3
    with pytest.raises(DataError, match="KeyboardInterrupt"):
        store.wait(3, timeout_s=5)
    before = {path.name: path.stat().st_mtime_ns for path in config.windows_dir.glob("window-*")}
    decided = sum(manifest.num_clips for manifest in store.committed())

    summary = run_pipeline(config)
    assert not (config.windows_dir / FAILED_FILE).exists()
    assert before == {name: (config.windows_dir / name).stat().st_mtime_ns for name in before}, "committed once"
    assert summary.windows_committed == summary.num_windows - 3
    assert summary.clips_decoded <= summary.num_clips - decided, "finished blocks are taken over, not decoded again"
    assert summary.num_clips == num_rows_in_shards(config) == 481
    assert summary.rows_in == summary.ok + summary.failed == 500
    windows = read_all(config)
    ids = sample_ids(windows)
    assert len(ids) == 500
    assert len(set(ids)) == 500, "no row is lost or repeated"
    failed = {
        str(name): error_class
        for window in windows
        for name, status, error_class in zip(
            *(window.table[key].to_pylist() for key in ("sample_id", "status", "error_class")), strict=True
        )
        if status != "ok"
    }
    num_bad_shared = 9
    assert len(failed) == summary.failed == len(is_bad) + num_bad_shared + 2
    assert {failed[str(row)] for row, kind in is_bad.items() if kind == 0} == {"media_empty"}
    assert {failed[str(row)] for row, kind in is_bad.items() if kind == 1} == {"media_not_recognised"}
    assert (failed["missing"], failed["records.json#499"]) == ("source_not_found", "invalid_data")
    assert all(failed[f"shared-{i}"] == "media_empty" for i in range(0, 18, 2)), "a clip fails all its samples"
    for window in windows:
        for sample in window:
            row = int(sample.sample_id) if sample.sample_id.isdecimal() else 1
            assert sample.frames[0][0].mean() == pytest.approx(4 * (row % 50), abs=2), "neighbours keep their frames"

    again = run_pipeline(config)
    assert (again.windows_committed, again.clips_decoded, again.rows_in) == (0, 0, 500)
    assert again.by_error_class == summary.by_error_class


def test_other_records_in_another_order_reuse_the_shards_that_are_there(tmp_path: Path, tiny_valley: Path) -> None:
    for index in range(7):
        write_clip(tmp_path / f"{index}.mp4", brightness=20 * index)
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    names = [*map(str, range(6)), "bad"]
    records = [{"id": name, "video": f"{name}.mp4", "conversations": turns()} for name in names]
    config = make_config(tmp_path, tiny_valley, records, windows_dir=tmp_path / "first", shards_dir=tmp_path / "shards")
    assert run_pipeline(config).clips_decoded == 7
    assert not list((tmp_path / "first").glob("*.arrow.*")), "no shard beside the windows"
    more = [{"id": f"{name}-again", "video": f"{name}.mp4", "conversations": turns("<video>\nWhy?")} for name in "6501"]
    other = make_config(
        tmp_path, tiny_valley, [*more, records[6]], windows_dir=tmp_path / "w" / "x", seed=3, block_size=2
    )
    other = other.model_copy(update={"shards_dir": tmp_path / "shards"})
    summary = run_pipeline(other)
    assert (summary.rows_in, summary.ok, summary.num_clips, summary.clips_decoded) == (5, 4, 5, 1)
    for settings in (config, other):
        for sample in (one for window in read_all(settings) for one in window):
            assert sample.frames[0][0].mean() == pytest.approx(20 * int(sample.sample_id[0]), abs=2)
    resampled = other.model_copy(update={"windows_dir": tmp_path / "y", "sampling": FrameSampling(num_frames=2)})
    assert run_pipeline(resampled).clips_decoded == 5, "other frames are other shards, in the same folder"
    with exclusive(tmp_path / "shards"), pytest.raises(DataError, match="choose another shards_dir"):
        run_pipeline(other)


def test_a_second_epoch_and_another_order_decode_nothing(tmp_path: Path) -> None:
    videos = [write_clip(tmp_path / f"{index}.mp4", brightness=20 + index) for index in range(5)]
    assert second_epoch_decodes(videos, tmp_path / "epochs") == 0


def test_store_of_other_records_or_of_another_writer_is_left_alone(tmp_path: Path, tiny_valley: Path) -> None:
    records = [{"id": "a", "conversations": turns("How many?")}]
    config = make_config(tmp_path, tiny_valley, records)
    assert run_pipeline(config).ok == 1
    with exclusive(config.windows_dir), pytest.raises(DataError, match="another pipeline is writing"):
        run_pipeline(config)
    assert not (config.windows_dir / FAILED_FILE).exists()
    other = make_config(tmp_path, tiny_valley, [*records, {"id": "b", "conversations": turns("How many?")}])
    with pytest.raises(DataError, match="another records, order; choose another windows_dir"):
        run_pipeline(other)
    resampled = make_config(tmp_path, tiny_valley, records, sampling={"num_frames": 2})
    with pytest.raises(DataError, match="another sampling"):
        run_pipeline(resampled)


def test_failed_start_is_told_to_waiting_trainers(tmp_path: Path, tiny_valley: Path) -> None:
    config = make_config(tmp_path, tiny_valley, [])
    with pytest.raises(DataError, match="no record"):
        run_pipeline(config)
    with pytest.raises(DataError, match="no record"):
        WindowStore(config.windows_dir).wait(0, timeout_s=5)
