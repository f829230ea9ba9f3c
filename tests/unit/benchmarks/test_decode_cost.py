"""What benchmark_data compares is equal, and its clips are what they are said to be."""

import av
import numpy as np
import pytest

from valley_ray.benchmarks.decode_cost import DecodeCost, FileCost, cpu_ratio, long_videos, measure, real_videos


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    config = DecodeCost(clips=tmp_path_factory.mktemp("clips"), num_clips=2, clip_s=1.0)
    return config, long_videos(config, num_bframes=3)


def test_both_chains_give_equal_pixels_and_both_are_timed(clips):
    pytest.importorskip("decord")
    (cost,) = measure(clips[1][:1], num_rounds=1, must_equal=True)
    assert cost.our_cpu_ms > 0
    assert cost.reference_cpu_ms > 0


def test_clips_are_distinct_have_b_frames_and_are_kept(clips):
    config, paths = clips
    pictures = []
    for path in paths:
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        assert [frame.key_frame for frame in frames] == [True] + [False] * 24
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in frames)
        pictures.append(frames[0].to_ndarray(format="rgb24").astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 5
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in long_videos(config, num_bframes=3)] == times


def test_ratio_counts_only_files_that_both_read():
    costs = [FileCost("a", 10, 10, 30, 30), FileCost("b", 30, 30, 30, 30), FileCost("c", 99, 99, None, None)]
    assert cpu_ratio(costs) == 1.5
    assert cpu_ratio(costs[2:]) is None


def test_manifest_says_which_files_are_timed(tmp_path):
    assert real_videos(tmp_path / "absent") == []
    (tmp_path / "manifest.json").write_text('{"a.mp4": {"status": "ok"}, "b.mp4": {"status": "error"}}')
    assert real_videos(tmp_path) == [tmp_path / "a.mp4"]
