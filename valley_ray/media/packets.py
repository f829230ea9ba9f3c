"""Lists the video packets of an opened container and holds them against its header. Decodes nothing.

The packet list, not the header, says how many frames are shown and when: headers count discarded pre-roll packets of
stream-copied clips, and a cut file still has the header of the whole one.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from valley_ray.errors import CorruptMediaError, MediaLimitError, TruncatedMediaError
from valley_ray.media.container import average_fps, duration_s, reason
from valley_ray.media.source import DecodeLimits

_MIN_SHOWN_SHARE = 0.9
"""A file that shows less than this share of its announced duration is truncated (design: data platform, issue 4)."""


@dataclass(frozen=True, eq=False)
class PacketTable:
    """The video packets of a file in decode order. N packets, F shown frames."""

    pts: npt.NDArray[np.int64]
    """int64 [N], stream time base; no two are equal."""
    dts: npt.NDArray[np.int64]
    """int64 [N], stream time base; only good as a place to seek to."""
    is_key: npt.NDArray[np.bool_]
    """bool [N]."""
    shown: npt.NDArray[np.int64]
    """int64 [F]: decode position of each shown packet, in presentation order."""

    def times_s(self, time_base: float) -> npt.NDArray[np.float64]:
        """float64 [F], presentation time of each shown frame, seconds."""
        return self.pts[self.shown].astype(np.float64) * time_base


def read_packets(container: Any, stream: Any, *, name: str, limits: DecodeLimits) -> PacketTable | None:
    """List the packets of `stream` to the end of the file; None where they do not tell which frames are shown when.

    They do not for animated GIF (its decoder shows other frames than there are packets), AVI with B-frames (its times
    are libav's guess) and packets without times or with equal ones: those are decoded one after the other.

    Raises:
        CorruptMediaError: the container breaks off with an error.
        MediaLimitError: more packets than the limits allow.
    """
    if container.format.name == "gif" or (container.format.name == "avi" and stream.codec_context.has_b_frames):
        return None
    pts, dts, is_key, is_shown = array("q"), array("q"), bytearray(), bytearray()
    hidden_bit = stream.codec_context.name in ("vp8", "libvpx")
    try:
        for packet in video_packets(container, stream):
            if packet.pts is None:
                return None
            pts.append(packet.pts)
            # Matroska stores no decoding times; libav guesses them, from the second packets on.
            dts.append(packet.dts if packet.dts is not None else packet.pts)
            is_key.append(packet.is_keyframe)
            # VP8 packs frames that are only referred to (alt-ref) as packets of their own; RFC 6386, 9.1: show_frame.
            is_shown.append(not packet.is_discard and not (hidden_bit and not memoryview(packet)[0] & 0x10))
            if len(pts) > limits.max_packets:
                raise MediaLimitError(f"{name}: more than {limits.max_packets=} packets; cut it")
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise CorruptMediaError(f"{name}: the container breaks off ({reason(error)}); copy it again") from error
    return _table(pts, dts, is_key, is_shown)


def video_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of `stream` from where the container stands, without the empty ones that PyAV appends."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except IndexError:
        # PyAV (18.1) trips, behind the last packet, over streams that came up while it read (transport streams).
        return


def _table(pts: "array[int]", dts: "array[int]", is_key: bytearray, is_shown: bytearray) -> PacketTable | None:
    pts_N = np.frombuffer(pts, np.int64) if pts else np.empty(0, np.int64)
    dts_N = np.frombuffer(dts, np.int64) if dts else np.empty(0, np.int64)
    positions = np.flatnonzero(np.frombuffer(is_shown, np.bool_)) if is_shown else np.empty(0, np.int64)
    shown = positions[np.argsort(pts_N[positions], kind="stable")]
    if len(np.unique(pts_N)) < len(pts_N):
        return None
    return PacketTable(pts_N, dts_N, np.frombuffer(bytes(is_key), np.bool_), shown)


def check_complete(container: Any, stream: Any, times_s: npt.NDArray[np.float64], *, name: str) -> None:
    """Raise TruncatedMediaError where the shown frames cover too little of the announced duration.

    Frames x frame duration is held against the duration. A clip that falls short is still whole where its last frame
    is near the announced end and its frame rate varies, or where another stream (longer audio) reaches the end.

    Args:
        times_s: float64 [F], ascending times of the shown frames.
    """
    expected = duration_s(container, stream)
    if not expected or not np.isfinite(expected):
        return
    fps = average_fps(stream)
    gaps = np.diff(times_s)
    frame_s = 1 / fps if fps else float(np.median(gaps)) if len(gaps) else 0.0
    covered = len(times_s) * frame_s
    if covered >= _MIN_SHOWN_SHARE * expected or (len(times_s) == 1 and not frame_s):
        return
    if len(gaps):
        reaches_end = times_s[-1] - times_s[0] + frame_s >= _MIN_SHOWN_SHARE * expected
        if reaches_end and not _has_one_hole(gaps):
            return
    if stream.duration is None and _other_streams_end_s(container, stream) >= _MIN_SHOWN_SHARE * expected:
        return
    raise TruncatedMediaError(
        f"{name}: shows {len(times_s)} frames ({covered:.2f} s) of {expected:.2f} s announced; "
        "the file is cut off or has a hole, copy it again"
    )


def _has_one_hole(gaps_s: npt.NDArray[np.float64]) -> bool:
    """One long gap between frames of an otherwise constant rate: lost packets, not a variable frame rate."""
    typical = float(np.median(gaps_s))
    return int(np.count_nonzero(gaps_s > 3 * typical + 0.05)) == 1


def _other_streams_end_s(container: Any, stream: Any) -> float:
    """Time of the last packet of the other streams, seconds; reads the file a second time, which only suspects pay."""
    ends = [0.0]
    others = [other for other in container.streams if other.type == "audio"]
    if not others:
        return 0.0
    for other in others:
        other.discard = av.stream.Discard.default
    try:
        container.seek(0)
        for packet in container.demux(others):
            if packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
    except av.error.FFmpegError:
        return 0.0
    finally:
        for other in others:
            other.discard = av.stream.Discard.all
    return max(ends)
