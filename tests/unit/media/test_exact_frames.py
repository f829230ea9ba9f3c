"""Random frames of every kind of file equal a sequential decode: what is skipped is never missed."""

from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import decode_all, write_clip

from valley_ray.media import pyav_backend
from valley_ray.media.decode import frames, probe
from valley_ray.media.sampling import FrameSampling

OPEN = "keyint=20:min-keyint=20:open-gop=1:bframes=3:b-adapt=0:scenecut=0"
CLIPS = {
    "no B-frames": ("a.mp4", {"gop": 50, "options": {"bf": "0"}}),
    "B-frames and a pyramid": (
        "a.mp4",
        {"gop": 50, "options": {"x264-params": "bframes=5:b-adapt=0:b-pyramid=normal"}},
    ),
    "a strict pyramid": ("a.mp4", {"gop": 50, "options": {"x264-params": "bframes=7:b-adapt=0:b-pyramid=strict"}}),
    "open groups": ("a.mp4", {"options": {"x264-params": OPEN}}),
    "open groups in Matroska": ("a.mkv", {"options": {"x264-params": OPEN}}),
    "hevc in mov": ("a.mov", {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=40:bframes=4"}}),
    "mpeg-4 in mov": ("a.mov", {"codec": "mpeg4", "gop": 30, "options": {"bf": "2"}}),
    "motion jpeg in mov": ("a.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "vp9 in mp4": ("a.mp4", {"codec": "libvpx-vp9", "gop": 40, "options": {"cpu-used": "8"}}),
    "png in mov": ("a.mov", {"codec": "png", "pix_fmt": "rgb24", "num_frames": 12}),
    "fragments": ("a.mp4", {"gop": 25, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
}


def check_random_frames(path, monkeypatch, *, num_draws=6):
    """Any set of frames, decoded by plan, equals those of the sequential decode."""
    every_frame, times_s = decode_all(path)
    random = np.random.default_rng(0)
    monkeypatch.setattr(pyav_backend, "_decode_sequentially", lambda *_, **__: pytest.fail("not by plan"))
    for _ in range(num_draws):
        indices = np.sort(random.integers(0, len(every_frame), int(random.integers(1, 9))))
        with monkeypatch.context() as patch:
            patch.setattr(pyav_backend, "_choose", lambda *_, indices=indices, **__: indices)
            video = frames(path, FrameSampling())
        np.testing.assert_array_equal(video.frames_THWC, every_frame[indices], err_msg=f"{indices=}")
        np.testing.assert_allclose(video.pts_seconds, times_s[indices], atol=1e-9)
    assert probe(path).num_frames == len(every_frame)


@pytest.mark.parametrize("case", CLIPS)
def test_random_frames_equal_a_sequential_decode(tmp_path, case, monkeypatch):
    file_name, options = CLIPS[case]
    check_random_frames(write_clip(tmp_path / file_name, **{"num_frames": 130, **options}), monkeypatch)


@pytest.mark.parametrize("num_bframes", [0, 3])
def test_random_frames_of_a_cut_clip_equal_a_sequential_decode(tmp_path, num_bframes, monkeypatch):
    whole = write_clip(tmp_path / "whole.mp4", num_frames=130, gop=50, options={"bf": str(num_bframes)})
    cut = cut_without_encoding(whole, tmp_path / "cut.mp4", start_s=1.0)
    with av.open(str(cut)) as media:
        assert sum(packet.is_discard for packet in media.demux(video=0)) >= 25
    check_random_frames(cut, monkeypatch)


def cut_without_encoding(source, target, *, start_s):
    """A stream copy whose first `start_s` seconds are hidden by an edit list, as cutting tools make it."""
    with av.open(str(source)) as whole, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (time - int(start_s / packet.time_base) for time in (packet.pts, packet.dts))
                packet.stream = stream
                cut.mux(packet)
    return target


def test_random_frames_of_a_variable_rate_equal_a_sequential_decode(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    gaps = np.random.default_rng(1).integers(10, 120, 130)
    with av.open(str(path), "w") as media:
        stream = media.add_stream("libx264", rate=30, options={"bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 50
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(np.cumsum(gaps)):
            picture = np.full((48, 64, 3), index, np.uint8)
            picture[:, index % 60 : index % 60 + 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            media.mux(stream.encode(frame))
        media.mux(stream.encode(None))
    check_random_frames(path, monkeypatch)


def test_h264_that_does_not_say_how_far_frames_are_out_of_order(tmp_path, monkeypatch):
    options = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=normal"}
    said = write_clip(tmp_path / "said.mp4", num_frames=130, gop=50, options=options)
    every_frame, _ = decode_all(said)
    path = tmp_path / "a.mp4"
    path.write_bytes(forget_reordering(said))
    monkeypatch.setattr(pyav_backend, "_decode_sequentially", lambda *_, **__: pytest.fail("not by plan"))
    for num_frames in (5, 8, 130):
        indices = np.linspace(0, 129, num_frames).astype(int)
        video = frames(path, FrameSampling(num_frames=num_frames))
        np.testing.assert_array_equal(video.frames_THWC, every_frame[indices])


def forget_reordering(path):
    """The bytes of an mp4 by x264 without the last part of its parameters (H.264 E.1.1, bitstream_restriction)."""
    content = path.read_bytes()
    record = content.index(b"avcC") + 4
    start, length = record + 8, int.from_bytes(content[record + 6 : record + 8], "big")
    bits = "".join(f"{byte:08b}" for byte in content[start : start + length])
    end = bits.rindex("1")
    flag = next(place for place in range(end - 60, end) if restriction_end(bits, place) == end)
    changed = bits[:flag] + "01" + "0" * (len(bits) - flag - 2)
    sequence = bytes(int(changed[place : place + 8], 2) for place in range(0, len(changed), 8))
    return content[:start] + sequence + content[start + length :]


def restriction_end(bits, place):
    """Where the part ends if it starts at `place`: two flags that are set, six exp-Golomb codes, the first two 0."""
    if bits[place : place + 4] != "1111":
        return None
    place += 4
    for _ in range(4):
        num_zeros = bits.find("1", place) - place
        place += 2 * num_zeros + 1
    return place


def test_mp4_of_one_stream_is_opened_without_decoding(tmp_path, monkeypatch):
    opened, real_open = [], av.open
    paths = [write_clip(tmp_path / name, **CLIPS["no B-frames"][1]) for name in ("a.mp4", "a.mkv")]
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(options) or real_open(*args, **options))
    for path in paths:
        frames(path, FrameSampling())
    assert [call["options"].get("skip_frame") for call in opened] == ["all", None]
