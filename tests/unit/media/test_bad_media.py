"""Every way a file can be bad has its class and its one-line message."""

import av
import numpy as np
import pytest
from media_files import write_audio, write_clip
from PIL import Image

from valley_ray.errors import (
    CorruptMediaError,
    EmptyMediaError,
    MediaError,
    MediaLimitError,
    NotMediaError,
    NoVideoStreamError,
    SourceNotFoundError,
    TruncatedMediaError,
)
from valley_ray.media.decode import DecodeLimits, frames, probe
from valley_ray.media.sampling import FrameSampling

FASTSTART = {"container_options": {"movflags": "faststart"}}


def refused(path, error_class, **options):
    with pytest.raises(error_class) as caught:
        frames(path, FrameSampling(), **options)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert "\n" not in message
    return message


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def zero_middle(path):
    content = bytearray(path.read_bytes())
    start, end = int(len(content) * 0.4), int(len(content) * 0.6)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return path


def test_missing_file(tmp_path):
    refused(tmp_path / "gone.mp4", SourceNotFoundError)
    refused(tmp_path / ("x" * 5000), SourceNotFoundError)


def test_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    refused(tmp_path / "a.mp4", EmptyMediaError)


@pytest.mark.parametrize(
    "content",
    [
        b"this is a text that was renamed\n" * 40,
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"1\n00:00:01,000 --> 00:00:02,000\na subtitle\n",
        bytes(100_000),
        b"x",
    ],
    ids=["text", "html", "playlist", "concat script", "subtitles", "zeros", "one byte"],
)
def test_other_files_renamed_to_mp4(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    refused(tmp_path / "a.mp4", NotMediaError)


def test_playlist_cannot_name_another_file(tmp_path):
    clip = write_clip(tmp_path / "secret.mp4", num_frames=5)
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    refused(tmp_path / "a.mp4", NotMediaError)


def test_audio_only(tmp_path):
    assert "audio" in refused(write_audio(tmp_path / "a.mp4"), NoVideoStreamError)


def test_mp4_cut_before_its_index(tmp_path):
    assert "moov" in refused(cut(write_clip(tmp_path / "a.mp4"), 0.6), TruncatedMediaError)


@pytest.mark.parametrize("file_name", ["a.mp4", "a.mkv", "a.flv"])
def test_cut_file_shows_less_than_it_announces(tmp_path, file_name):
    path = cut(write_clip(tmp_path / file_name, gop=15, **(FASTSTART if file_name == "a.mp4" else {})), 0.6)
    assert "announced" in refused(path, TruncatedMediaError)
    with pytest.raises(TruncatedMediaError):
        probe(path)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_cut_webm(tmp_path, codec):
    refused(cut(write_clip(tmp_path / "a.webm", codec=codec, options={"cpu-used": "5"}), 0.6), TruncatedMediaError)


def test_cut_near_the_end_does_not_decode(tmp_path):
    refused(cut(write_clip(tmp_path / "a.mp4", **FASTSTART), 0.97), CorruptMediaError)


def test_zeroed_middle_of_mp4_does_not_decode(tmp_path):
    refused(zero_middle(write_clip(tmp_path / "a.mp4", **FASTSTART)), CorruptMediaError)


@pytest.mark.parametrize("file_name", ["a.mkv", "a.flv", "a.ts", "a.webm", "a.avi"])
def test_zeroed_middle_of_other_containers(tmp_path, file_name):
    codec = "libvpx-vp9" if file_name == "a.webm" else "libx264"
    refused(
        zero_middle(write_clip(tmp_path / file_name, codec=codec, num_frames=90)),
        (CorruptMediaError, TruncatedMediaError),
    )


def test_bit_flips_never_escape_the_error_tree(tmp_path):
    content = write_clip(tmp_path / "a.mp4", num_frames=20, **FASTSTART).read_bytes()
    random = np.random.default_rng(7)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(damaged), 12):
            damaged[place] ^= 1 << int(random.integers(8))
        try:
            frames(bytes(damaged), FrameSampling())
            outcomes.add("ok")
        except MediaError as error:
            outcomes.add(error.code)
    assert len(outcomes) > 1


def test_video_shorter_than_its_audio_is_whole(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=30)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=44100)
        for _ in range(30):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100 * 3), np.float32), format="fltp", layout="mono")
        sound.rate, sound.pts = 44100, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    assert len(frames(path, FrameSampling())) == 8


def test_variable_frame_rate_is_whole(tmp_path):
    path = tmp_path / "a.mkv"
    shown_at = [*range(10), 40, 90, 150, *range(200, 210), 280]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in shown_at:
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index % 255, np.uint8), format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert frames(path, FrameSampling(num_frames=2)).pts_seconds[-1] == pytest.approx(280 / 30, abs=2e-3)


def test_limits_hold_before_anything_is_decoded(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num_frames=30)
    for limits in ({"max_pixels": 3000}, {"max_duration_s": 0.5}, {"max_packets": 10}):
        refused(path, MediaLimitError, limits=DecodeLimits(**limits))
        with pytest.raises(MediaLimitError):
            probe(path, limits=DecodeLimits(**limits))
    for limits in ({"max_frames": 4}, {"max_output_bytes": 99}):
        refused(path, MediaLimitError, limits=DecodeLimits(**limits))


def test_too_many_streams(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10, width=16, height=16) for _ in range(6)]
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode(None))
    refused(path, MediaLimitError, limits=DecodeLimits(max_streams=5))


def test_image_bomb_and_cut_image(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    refused(tmp_path / "bomb.png", MediaLimitError)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    refused(cut(tmp_path / "a.jpg", 0.6), TruncatedMediaError)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"junk" * 30)
    refused(tmp_path / "b.png", CorruptMediaError)


def test_odd_file_names_stay_on_one_line(tmp_path):
    path = tmp_path / "a\nb.mp4"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(NotMediaError) as caught:
        frames(path, FrameSampling())
    assert "\n" not in str(caught.value)
