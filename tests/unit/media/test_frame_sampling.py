"""Which frames are chosen."""

import numpy as np
import pytest

from valley_ray.config import validate_config
from valley_ray.errors import ConfigError, SamplingError
from valley_ray.media.sampling import FrameSampling, frame_indices, window_frames


def test_default_is_eight_frames_with_truncated_indices():
    assert frame_indices(FrameSampling(), num_frames=984, fps=30.0).tolist() == [0, 140, 280, 421, 561, 702, 842, 983]


def test_short_video_repeats_frames():
    assert frame_indices(FrameSampling(), num_frames=3, fps=30.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]


def test_fps_steps_by_whole_frames_of_the_rounded_rate():
    assert frame_indices(FrameSampling(fps=0.5), num_frames=130, fps=29.97).tolist() == [0, 60, 120]


def test_fps_above_the_clips_rate_takes_every_frame():
    assert frame_indices(FrameSampling(fps=60), num_frames=4, fps=10.0).tolist() == [0, 1, 2, 3]


def test_the_smallest_fps_takes_the_first_frame():
    assert frame_indices(FrameSampling(fps=5e-324), num_frames=4, fps=10.0).tolist() == [0]


def test_fps_of_media_without_rate_is_refused():
    with pytest.raises(SamplingError, match="without a frame rate"):
        frame_indices(FrameSampling(fps=1), num_frames=4, fps=0.0)


@pytest.mark.parametrize(
    "values",
    [{"num_frames": 8, "fps": 1.0}, {"num_frames": None}, {"start_s": 2.0, "end_s": 1.0}, {"num_frames": 0}],
)
def test_contradictory_samplings_are_refused(values):
    with pytest.raises(ConfigError):
        validate_config(FrameSampling, values, source="test")


def test_keys_tell_samplings_apart_and_survive_a_round_trip():
    samplings = [
        FrameSampling(),
        FrameSampling(num_frames=4),
        FrameSampling(fps=4),
        FrameSampling(start_s=1.0),
        FrameSampling(end_s=1.0),
        FrameSampling(start_s=1.0, end_s=2.0),
        FrameSampling(folder_order="directory"),
    ]
    assert len({sampling.key for sampling in samplings}) == len(samplings)
    for sampling in samplings:
        assert FrameSampling(**sampling.model_dump()).key == sampling.key


def test_window_is_measured_from_the_first_frame():
    times_s = 1.4 + np.arange(10) / 10
    assert window_frames(FrameSampling(start_s=0.2, end_s=0.5), times_s, name="clip") == (2, 5)
    assert window_frames(FrameSampling(), times_s, name="clip") == (0, 10)


def test_window_behind_the_clip_is_refused_with_its_end():
    with pytest.raises(SamplingError, match=r"clip: no frame between start_s=5\.0.*0\.900 s"):
        window_frames(FrameSampling(start_s=5.0), np.arange(10) / 10, name="clip")
