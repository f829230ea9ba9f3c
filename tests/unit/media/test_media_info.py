"""Decoded frames carry what their container said, learnt while decoding."""

from dataclasses import replace

import av
import numpy as np
import pytest
from media_files import write_clip
from PIL import Image

from valley_ray.media import container, packets
from valley_ray.media.decode import frames, probe
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling


def test_a_clip_carries_length_rate_and_size_whatever_is_sampled(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", num_frames=60, fps=30)
    for sampling in (FrameSampling(), FrameSampling(start_s=1.0, end_s=1.5, num_frames=2)):
        info = frames(clip, sampling, crop=Crop(size=16)).info
        assert (info.kind, info.num_frames, info.fps, info.duration_s) == ("video", 60, 30.0, 2.0)
        assert (info.width, info.height, info.codec, info.rotation) == (64, 48, "h264", 0)
        assert replace(info, rotation=None) == probe(clip)


def test_a_sequential_decode_carries_the_frames_that_it_counted(tmp_path):
    clip = write_clip(tmp_path / "a.gif", codec="gif", num_frames=12, pix_fmt="rgb8", fps=10)
    assert probe(clip).num_frames is None
    info = frames(clip, FrameSampling(num_frames=3)).info
    assert (info.num_frames, info.codec, info.width, info.height) == (12, "gif", 64, 48)


def test_decord_carries_what_the_header_says(tmp_path):
    pytest.importorskip("decord", reason="decord has no wheel here")
    clip = write_clip(tmp_path / "a.mp4", num_frames=60, fps=30)
    info = frames(clip, FrameSampling(), backend="decord").info
    assert info == probe(clip)


def test_a_turned_clip_says_its_upright_size(tmp_path):
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    video = frames(path, FrameSampling(num_frames=1))
    assert abs(video.info.rotation) == 90
    assert (video.info.width, video.info.height) == (64, 48)
    assert video.info.upright_size == (48, 64) == video.frames_THWC.shape[2:0:-1]


def test_images_carry_their_size_and_exif_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    image = frames(tmp_path / "a.jpg", FrameSampling())
    assert (image.info.kind, image.info.codec, image.info.width, image.info.height) == ("image", "jpeg", 40, 20)
    assert image.info.upright_size == (20, 40) == image.frames_THWC.shape[2:0:-1]
    assert image.info.duration_s is None
    folder = frames(tmp_path, FrameSampling(num_frames=2)).info
    assert (folder.kind, folder.num_frames, folder.fps, folder.upright_size) == ("frames", 1, 0.0, (20, 40))


def test_nothing_is_read_twice_for_it(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.mp4")
    opened, listed = [], []
    open_with, demuxed = container._open_with, packets.video_packets
    monkeypatch.setattr(container, "_open_with", lambda *a, **k: opened.append(1) or open_with(*a, **k))
    monkeypatch.setattr(packets, "video_packets", lambda *a: listed.append(1) or demuxed(*a))
    assert frames(clip, FrameSampling()).info.num_frames == 60
    assert (len(opened), len(listed)) == (1, 1)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), None])
def test_a_senseless_duration_is_no_duration(tmp_path, monkeypatch, seconds):
    clip = write_clip(tmp_path / "a.mp4")
    with container.open_video(clip, name="a.mp4", limits=container.DecodeLimits()) as (opened, stream):
        monkeypatch.setattr(container, "duration_s", lambda *_: seconds)
        assert container.media_info(opened, stream, num_frames=1).duration_s is None
