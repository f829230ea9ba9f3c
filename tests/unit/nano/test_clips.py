"""Scenes on disk are real H.264 that decodes to what was rendered."""

from pathlib import Path

import av
import numpy as np

from valley_ray.media.decode import frames, probe
from valley_ray.media.sampling import FrameSampling
from valley_ray.nano.clips import write_scene
from valley_ray.nano.world import render, sample_scene


def test_clip_is_h264_with_the_scenes_frames(tmp_path: Path) -> None:
    scene = sample_scene(0, 0, "pair")
    write_scene(tmp_path / "clip.mp4", scene)
    info = probe(tmp_path / "clip.mp4")
    assert info.codec == "h264"
    assert info.num_frames == scene.num_frames
    decoded = frames(tmp_path / "clip.mp4", FrameSampling(num_frames=scene.num_frames)).frames_THWC
    rendered = render(scene, np.linspace(0, 1, scene.num_frames))
    # crf 18 with halved chroma: the mean error stays within a few levels, a wrong frame order would not.
    assert np.abs(decoded.astype(int) - rendered).mean() < 6


def test_writing_a_scene_twice_gives_equal_files(tmp_path: Path) -> None:
    scene = sample_scene(0, 1, "single")
    for name in ("a.mp4", "b.mp4"):
        write_scene(tmp_path / name, scene)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
