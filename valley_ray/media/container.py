"""Opens a container with PyAV and holds its header against the limits."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

import av

from valley_ray.errors import (
    CorruptMediaError,
    MediaError,
    MediaLimitError,
    NotMediaError,
    NoVideoStreamError,
    TruncatedMediaError,
)
from valley_ray.media.source import DecodeLimits, MediaInfo, MediaSource, read_head

# Only demuxers of self-contained media: playlists and scripts (hls, concat, ffmetadata) name other files and hosts, and
# the text demuxers "recognise" any text. The audio ones are here so that audio is named as such.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,h264,hevc,obu,rm,mxf,"
    "wav,mp3,aac,flac,ac3,aiff"
)
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot")
_MAGICS = (b"\x1aE\xdf\xa3", b"RIFF", b"GIF8", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"0&\xb2u", b"DKIF", b"ID3")
_HEADER_ONLY = {"skip_frame": "all", "probesize": "2048"}
"""Otherwise libav reads up to 5 MB and decodes up to 20 frames of each stream, to learn what the index of an mp4 says.
2048 bytes are the least by which it tells formats apart."""


def reason(error: BaseException) -> str:
    """libav's words for an error, on one line, without the file name that PyAV appends."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


@contextmanager
def open_video(
    source: MediaSource, *, name: str, limits: DecodeLimits, decode_first: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Yield (container, best video stream), its header checked; one decoding thread, other streams not read.

    Args:
        decode_first: let libav decode the first frames of every stream, also where the header tells enough.

    Raises:
        NotMediaError, TruncatedMediaError (an mp4 without its index), CorruptMediaError: the header cannot be read.
        NoVideoStreamError: nothing but audio or data; cover pictures do not count.
        MediaLimitError: the header asks for more than `limits`.
    """
    with _open(source, name=name, decode_first=decode_first) as container:
        if len(container.streams) > limits.max_streams:
            raise MediaLimitError(f"{name}: {len(container.streams)} streams are more than {limits.max_streams=}")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
            raise NoVideoStreamError(f"{name}: no video stream (streams: {kinds}); give a file with pictures")
        _check_header(container, stream, name=name, limits=limits)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        stream.codec_context.thread_count = 1
        yield container, stream


def _open(source: MediaSource, *, name: str, decode_first: bool) -> Any:
    if not decode_first and read_head(source, name=name)[4:8] in _MP4_BOXES:
        with suppress(MediaError):  # the thorough way says what is wrong
            container = _open_with(source, _HEADER_ONLY, name=name)
            if _header_tells(container):
                return container
            container.close()
    return _open_with(source, {}, name=name)


def _header_tells(container: Any) -> bool:
    """Whether size, rate and choice of the video stream are known before anything is decoded.

    Not so in fragmented files (no frame count), and among several streams the best is chosen by what was probed.
    """
    videos = container.streams.video
    if len(videos) != 1 or videos[0].codec_context is None:
        return False
    return bool(videos[0].frames > 0 and videos[0].codec_context.width > 0)


def _open_with(source: MediaSource, options: dict[str, str], *, name: str) -> Any:
    # "file:" keeps names such as "concat:a|b" from being read as protocols.
    target = f"file:{source.absolute()}" if isinstance(source, Path) else io.BytesIO(source)
    options = {"format_whitelist": _DEMUXERS, **options}
    try:
        return av.open(target, "r", options=options, metadata_errors="replace", buffer_size=1 << 16)
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        head = read_head(source, name=name)
        if head[4:8] in _MP4_BOXES:
            raise TruncatedMediaError(
                f"{name}: the mp4 index (moov box) is missing or cut off; copy the file again"
            ) from error
        if head.startswith(_MAGICS):
            raise CorruptMediaError(
                f"{name}: the container header cannot be read ({reason(error)}); copy it again"
            ) from error
        raise NotMediaError(f"{name}: not a video or image ({reason(error)}); give a media file") from error


def _check_header(container: Any, stream: Any, *, name: str, limits: DecodeLimits) -> None:
    codec = stream.codec_context
    if codec is None:
        raise CorruptMediaError(f"{name}: no decoder for its video stream; re-encode it, for example as H.264")
    check_pixels(codec.width, codec.height, name=name, limits=limits)
    seconds = duration_s(container, stream)
    if seconds is not None and seconds > limits.max_duration_s:
        raise MediaLimitError(f"{name}: announces {seconds:.0f} s, more than {limits.max_duration_s=}; cut it")


def check_pixels(width: int, height: int, *, name: str, limits: DecodeLimits) -> None:
    """Raise MediaLimitError for frames of more pixels than the limits allow."""
    if width * height > limits.max_pixels:
        raise MediaLimitError(f"{name}: frames of {width}x{height} are more than {limits.max_pixels=}; scale it down")


def duration_s(container: Any, stream: Any) -> float | None:
    """Announced length of the video stream, else of the container, seconds; None where neither says."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = next((text for key, text in stream.metadata.items() if key.upper().startswith("DURATION")), None)
    if tag is not None and (seconds := _clock_seconds(tag)) is not None:
        return seconds
    return container.duration / av.time_base if container.duration is not None else None


def _clock_seconds(text: str) -> float | None:
    """ "00:00:10.381000000", Matroska's per-stream DURATION tag."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def average_fps(stream: Any) -> float:
    """Average frames per second of a stream as the container says; 0 where unknown."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def media_info(container: Any, stream: Any, *, num_frames: int | None) -> MediaInfo:
    """What the header says, with the number of frames as counted."""
    codec = stream.codec_context
    seconds = duration_s(container, stream)
    return MediaInfo(
        kind="video",
        num_frames=num_frames,
        fps=max(0.0, average_fps(stream)),
        width=codec.width,
        height=codec.height,
        duration_s=seconds if seconds is not None and isfinite(seconds) and seconds >= 0 else None,
        stream_index=stream.index,
        codec=codec.codec.canonical_name,
        num_streams=len(container.streams),
    )
