"""Frames of generated media: the planned decode equals a sequential one; images and folders."""

from pathlib import Path

import av
import numpy as np
import pytest
from media_files import decode_all, write_clip
from PIL import Image

from valley_ray.errors import ConfigError, CorruptMediaError, EmptyMediaError, MediaLimitError, SamplingError
from valley_ray.media import pyav_backend
from valley_ray.media.decode import DecodeLimits, frames, probe
from valley_ray.media.preprocess import Crop, resize_and_crop
from valley_ray.media.sampling import FrameSampling

QUIET = "log-level=none"
PLANNED = {
    "mp4 with B-frames": ("a.mp4", {"gop": 15, "options": {"bf": "3"}}),
    "mp4 of one group of pictures": ("a.mp4", {"gop": 300, "options": {"bf": "3"}}),
    "mp4 with open groups": ("a.mp4", {"gop": 15, "options": {"x264-params": "open-gop=1:bframes=3"}}),
    "mkv with open groups": ("a.mkv", {"gop": 15, "options": {"x264-params": "open-gop=1:bframes=3"}}),
    "transport stream": ("a.ts", {"gop": 15}),
    "flv": ("a.flv", {"gop": 15}),
    "interlaced": ("a.mp4", {"gop": 15, "options": {"x264-params": "tff=1:interlaced=1"}}),
    "hevc with open groups": ("a.mp4", {"codec": "libx265", "options": {"x265-params": f"{QUIET}:keyint=15"}}),
    "hevc with temporal layers": (
        "a.mp4",
        {"codec": "libx265", "options": {"x265-params": f"{QUIET}:keyint=15:temporal-layers=3:bframes=4"}},
    ),
    "vp8": (
        "a.webm",
        {"codec": "libvpx", "gop": 20, "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}},
    ),
    "vp9 with hidden frames": (
        "a.webm",
        {"codec": "libvpx-vp9", "gop": 20, "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}},
    ),
    "mpeg-4": ("a.mp4", {"codec": "mpeg4", "gop": 12, "options": {"bf": "2"}}),
}
SEQUENTIAL = {
    "animated GIF": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "fps": 10}),
    "avi with B-frames": ("a.avi", {"gop": 15, "options": {"bf": "3"}}),
    "gradual refresh": ("a.mkv", {"gop": 15, "options": {"x264-params": "intra-refresh=1"}}),
}
SAMPLINGS = (FrameSampling(), FrameSampling(num_frames=3), FrameSampling(num_frames=40))


@pytest.mark.parametrize("case", [*PLANNED, *SEQUENTIAL])
def test_frames_equal_a_sequential_decode(tmp_path, case, monkeypatch):
    file_name, options = {**PLANNED, **SEQUENTIAL}[case]
    path = write_clip(tmp_path / file_name, **options)
    if case in PLANNED:
        monkeypatch.setattr(pyav_backend, "_decode_sequentially", _not_by_plan)
    every_frame, times_s = decode_all(path)
    for sampling in SAMPLINGS:
        indices = np.linspace(0, len(every_frame) - 1, sampling.num_frames).astype(int)
        video = frames(path, sampling)
        np.testing.assert_array_equal(video.frames_THWC, every_frame[indices])
        if times_s.dtype == np.float64:  # some AVI frames have no time
            np.testing.assert_allclose(video.pts_seconds, times_s[indices], atol=1e-9)


def _not_by_plan(*_args, **_options):
    pytest.fail("fell back to the sequential decode")


def test_vp8_frames_that_are_never_shown_are_not_counted(tmp_path, monkeypatch):
    path = hide_vp8_frames(write_clip(tmp_path / "a.webm", codec="libvpx", gop=20), tmp_path / "hidden.webm", every=7)
    every_frame, _ = decode_all(path)
    assert probe(path).num_frames == len(every_frame) < 60
    monkeypatch.setattr(pyav_backend, "_decode_sequentially", _not_by_plan)
    indices = np.linspace(0, len(every_frame) - 1, 20).astype(int)
    np.testing.assert_array_equal(frames(path, FrameSampling(num_frames=20)).frames_THWC, every_frame[indices])


def hide_vp8_frames(source, target, *, every):
    """Clear show_frame in some inter frames, as an encoder does for frames that are only referred to."""
    with av.open(str(source)) as shown, av.open(str(target), "w") as hidden:
        stream = hidden.add_stream_from_template(shown.streams.video[0])
        for number, packet in enumerate(packet for packet in shown.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            if number % every == every - 1 and not packet.is_keyframe:
                content[0] &= ~0x10
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            hidden.mux(copy)
    return target


def test_hevc_frames_are_skipped_only_in_streams_of_one_temporal_layer(tmp_path):
    for file_name, parameters, may_skip in (("a.mp4", "", True), ("b.mp4", ":temporal-layers=3:bframes=4", False)):
        options = {"x265-params": f"{QUIET}:keyint=15{parameters}"}
        path = write_clip(tmp_path / file_name, codec="libx265", options=options, num_frames=10)
        with av.open(str(path)) as container:
            assert pyav_backend._skips_exactly(container.streams.video[0].codec_context) is may_skip


def test_stream_that_comes_up_late_does_no_harm(tmp_path):
    early = write_clip(tmp_path / "early.ts", gop=15)
    late = write_clip(tmp_path / "late.ts", codec="mpeg2video", container_options={"mpegts_start_pid": "0x200"})
    want = frames(early, FrameSampling())
    (tmp_path / "a.ts").write_bytes(early.read_bytes() + late.read_bytes())
    np.testing.assert_array_equal(frames(tmp_path / "a.ts", FrameSampling()).frames_THWC, want.frames_THWC)


def test_bytes_and_file_give_the_same_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    of_file, of_bytes = frames(path, FrameSampling()), frames(path.read_bytes(), FrameSampling())
    np.testing.assert_array_equal(of_file.frames_THWC, of_bytes.frames_THWC)


def test_window_takes_frames_of_the_window_only(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    video = frames(path, FrameSampling(num_frames=4, start_s=0.5, end_s=1.0))
    assert video.pts_seconds[0] == pytest.approx(0.5)
    assert video.pts_seconds[-1] == pytest.approx(29 / 30)


def test_window_behind_the_end_is_a_sampling_error(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num_frames=5)
    with pytest.raises(SamplingError, match=r"^a\.mp4: "):
        frames(path, FrameSampling(start_s=9.0))


def test_crop_in_the_decoder_equals_crop_afterwards(tmp_path):
    path, crop = write_clip(tmp_path / "a.mp4"), Crop(size=20, short_side=24)
    whole = frames(path, FrameSampling())
    cropped = frames(path, FrameSampling(), crop=crop)
    np.testing.assert_array_equal(cropped.frames_THWC, resize_and_crop(whole.frames_THWC, crop))


def test_probe_counts_shown_frames_without_decoding(tmp_path):
    info = probe(write_clip(tmp_path / "a.mp4", num_frames=45, fps=15))
    assert (info.kind, info.num_frames, info.fps, info.width, info.height) == ("video", 45, 15.0, 64, 48)
    assert info.duration_s == pytest.approx(3.0)
    assert info.codec == "h264"


def test_decord_backend_equals_pyav_on_a_plain_clip(tmp_path):
    pytest.importorskip("decord")
    path = write_clip(tmp_path / "a.mp4", size_wh=(128, 96))
    by_pyav, by_decord = (frames(path, FrameSampling(), backend=name) for name in ("pyav", "decord"))
    np.testing.assert_array_equal(by_decord.frames_THWC, by_pyav.frames_THWC)
    np.testing.assert_allclose(by_decord.pts_seconds, by_pyav.pts_seconds, atol=1e-3)


def test_decord_backend_holds_the_limits_and_reads_bytes(tmp_path):
    pytest.importorskip("decord")
    path = write_clip(tmp_path / "a.mp4", size_wh=(128, 96))
    many, crop = FrameSampling(num_frames=20), Crop(size=16, short_side=16)
    by_name, by_bytes = (frames(source, many, backend="decord", crop=crop) for source in (path, path.read_bytes()))
    assert by_name.frames_THWC.shape == (20, 16, 16, 3)
    np.testing.assert_array_equal(by_name.frames_THWC, by_bytes.frames_THWC)
    for limits in (DecodeLimits(max_frames=19), DecodeLimits(max_output_bytes=20 * 96 * 128 * 3 - 1)):
        with pytest.raises(MediaLimitError, match=r"^a\.mp4: "):
            frames(path, many, backend="decord", limits=limits)


def test_unknown_backend_is_named(tmp_path):
    with pytest.raises(ConfigError, match="'ffmpeg'"):
        frames(write_clip(tmp_path / "a.mp4", num_frames=2), FrameSampling(), backend="ffmpeg")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_image_is_one_frame_whatever_the_sampling(tmp_path, suffix):
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture).save(path)
    video = frames(path, FrameSampling(num_frames=8))
    np.testing.assert_array_equal(video.frames_THWC[0], np.asarray(Image.open(path).convert("RGB")))
    assert video.frames_THWC.shape == (1, 20, 30, 3)
    info = probe(path)
    assert (info.kind, info.num_frames, info.width, info.height) == ("image", 1, 30, 20)


def test_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert frames(tmp_path / "a.jpg", FrameSampling()).frames_THWC.shape == (1, 30, 20, 3)


def test_folder_of_images_is_read_in_order_of_names(tmp_path):
    for index in (3, 1, 4, 0, 2):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"f{index:02d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = frames(tmp_path, FrameSampling(num_frames=3))
    assert video.frames_THWC[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert probe(tmp_path).num_frames == 5


def test_folder_of_images_is_read_as_the_directory_lists_it_where_asked(tmp_path, monkeypatch):
    listing = [tmp_path / f"f{index:02d}.png" for index in (3, 1, 4, 0, 2)]
    for path in listing:
        Image.new("RGB", (8, 8), (int(path.stem[1:]), 0, 0)).save(path)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(listing))
    video = frames(tmp_path, FrameSampling(num_frames=3, folder_order="directory"))
    assert video.frames_THWC[:, 0, 0, 0].tolist() == [3, 4, 2]


def test_folder_of_unequal_images_needs_a_crop(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(CorruptMediaError, match="differ in size"):
        frames(tmp_path, FrameSampling())
    assert frames(tmp_path, FrameSampling(), crop=Crop(size=4, short_side=4)).frames_THWC.shape == (8, 4, 4, 3)


def test_folder_without_images_and_folder_at_a_rate_are_refused(tmp_path):
    with pytest.raises(EmptyMediaError):
        frames(tmp_path, FrameSampling())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SamplingError):
        frames(tmp_path, FrameSampling(fps=1.0))
