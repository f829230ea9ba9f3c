"""PyAV backend: decodes the sampled frames and as little else as it can; the frames equal a sequential decode.

The plan: list the packets, pick the shown frames, seek to the key frame before each, and let the decoder skip frames
that no other frame refers to. Whatever does not go by plan is decoded from the start, one frame after the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, dropwhile, pairwise
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from valley_ray.errors import CorruptMediaError, MediaLimitError
from valley_ray.media.container import average_fps, check_pixels, media_info, open_video, reason
from valley_ray.media.frames import VideoFrames
from valley_ray.media.packets import PacketTable, check_complete, read_packets, video_packets
from valley_ray.media.sampling import FrameSampling, frame_indices, window_frames
from valley_ray.media.source import DecodeLimits, MediaInfo, MediaSource

Transform = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]
"""uint8 [H, W, 3] -> uint8 [H', W', 3], for example a crop."""


@dataclass(frozen=True)
class _Target:
    """One frame to decode: its place among the shown frames, its packet's place in the file, its time."""

    index: int
    position: int
    pts: int


@dataclass(frozen=True)
class _Run:
    """Targets decoded in one go from the key packet at `start`; in decode order."""

    start: int
    targets: tuple[_Target, ...]


class _OffPlan(Exception):
    """The decoder did not show a planned frame; decode sequentially."""


def probe_video(source: MediaSource, *, name: str, limits: DecodeLimits) -> MediaInfo:
    """Header and number of shown frames of a video, without decoding; raises as `open_video` and `check_complete`."""
    with open_video(source, name=name, limits=limits) as (container, stream):
        table = read_packets(container, stream, name=name, limits=limits)
        if table is not None:
            check_complete(container, stream, table.times_s(float(stream.time_base)), name=name)
        return media_info(container, stream, num_frames=None if table is None else len(table.shown))


def decode_video(
    source: MediaSource, sampling: FrameSampling, *, name: str, limits: DecodeLimits, transform: Transform | None
) -> VideoFrames:
    """The sampled frames of a video; `transform` is applied to each frame as soon as it is decoded.

    Raises:
        MediaError: any of its kinds, see `valley_ray.media.decode.frames`.
    """
    with open_video(source, name=name, limits=limits) as (container, stream):
        table = read_packets(container, stream, name=name, limits=limits)
        if table is not None and len(table.shown):
            times_s = table.times_s(float(stream.time_base))
            check_complete(container, stream, times_s, name=name)
            indices = _choose(sampling, times_s, average_fps(stream), name=name, limits=limits)
            collect = _Collector(name=name, limits=limits, transform=transform)
            try:
                _decode_planned(container, stream, table, indices, collect)
            except (_OffPlan, av.error.FFmpegError) as error:
                # A false key frame, or a corrupt file: the sequential decode tells.
                if isinstance(error, MemoryError):
                    raise
            else:
                return collect.result(indices, times_s, media_info(container, stream, num_frames=len(times_s)))
    return _decode_sequentially(source, sampling, name=name, limits=limits, transform=transform)


def _choose(
    sampling: FrameSampling, times_s: npt.NDArray[np.float64], fps: float, *, name: str, limits: DecodeLimits
) -> npt.NDArray[np.int64]:
    """Indices of the sampled frames among all shown frames, the window applied."""
    if not fps and len(times_s) > 1:
        fps = (len(times_s) - 1) / float(times_s[-1] - times_s[0])
    first, last = window_frames(sampling, times_s, name=name)
    indices = first + frame_indices(sampling, num_frames=last - first, fps=fps)
    if len(indices) > limits.max_frames:
        raise MediaLimitError(f"{name}: {len(indices)} frames are more than {limits.max_frames=}; sample fewer")
    return indices


class _Collector:
    """Keeps the frames that were asked for, upright and transformed."""

    def __init__(self, *, name: str, limits: DecodeLimits, transform: Transform | None) -> None:
        self._name = name
        self._limits = limits
        self._transform = transform
        self._frames: dict[int, npt.NDArray[np.uint8]] = {}
        self._num_bytes = 0
        self._rotation: int | None = None
        self._reformatter = VideoReformatter()

    def __contains__(self, index: int) -> bool:
        return index in self._frames

    def add(self, index: int, frame: Any) -> None:
        """Convert one decoded frame; raises MediaLimitError for sizes that the header did not announce."""
        check_pixels(frame.width, frame.height, name=self._name, limits=self._limits)
        # A frame's own conversion starts threads and computes its tables anew for every frame.
        rgb: Any = self._reformatter.reformat(frame, format="rgb24", threads=1)
        frame_HWC: npt.NDArray[np.uint8] = rgb.to_ndarray()
        self._rotation = frame.rotation
        if frame.rotation % 360:
            frame_HWC = np.rot90(frame_HWC, frame.rotation // 90)
        if self._transform is not None:
            frame_HWC = self._transform(frame_HWC)
        self._num_bytes += frame_HWC.nbytes
        if self._num_bytes > self._limits.max_output_bytes:
            raise MediaLimitError(
                f"{self._name}: its frames are more than {self._limits.max_output_bytes=}; sample fewer"
            )
        self._frames[index] = frame_HWC

    def result(self, indices: npt.NDArray[np.int64], times_s: npt.NDArray[np.float64], info: MediaInfo) -> VideoFrames:
        """The frames at `indices`, repeated where they repeat."""
        shapes = {frame.shape for frame in self._frames.values()}
        if len(shapes) > 1:
            raise CorruptMediaError(f"{self._name}: frames change size ({sorted(shapes)}); ask for a crop")
        frames_THWC = np.empty((len(indices), *shapes.pop()), np.uint8)
        if frames_THWC.nbytes > self._limits.max_output_bytes:
            raise MediaLimitError(
                f"{self._name}: its frames are more than {self._limits.max_output_bytes=}; sample fewer"
            )
        for row, index in enumerate(indices):
            frames_THWC[row] = self._frames[int(index)]
        return VideoFrames(frames_THWC, times_s[indices], replace(info, rotation=self._rotation))


def _decode_planned(
    container: Any, stream: Any, table: PacketTable, indices: npt.NDArray[np.int64], collect: _Collector
) -> None:
    can_skip = _skips_exactly(stream.codec_context)
    for run in _plan(table, indices):
        _decode_run(container, stream, table, run, collect, can_skip=can_skip)


def _plan(table: PacketTable, indices: npt.NDArray[np.int64]) -> list[_Run]:
    """Group the wanted frames by the key packet that decoding has to start from.

    That is the last key packet that lies before the frame in the file and is not shown after it: leading frames of an
    open group of pictures refer to the group before.
    """
    keys = np.flatnonzero(table.is_key)
    runs: dict[int, list[_Target]] = {}
    for index in np.unique(indices):
        position = int(table.shown[index])
        pts = int(table.pts[position])
        before = keys[: int(np.searchsorted(keys, position, side="right"))]
        usable = before[table.pts[before] <= pts]
        start = int(usable[-1]) if len(usable) else 0
        runs.setdefault(start, []).append(_Target(int(index), position, pts))
    return [_Run(start, tuple(sorted(runs[start], key=lambda target: target.position))) for start in sorted(runs)]


def _decode_run(
    container: Any, stream: Any, table: PacketTable, run: _Run, collect: _Collector, *, can_skip: bool
) -> None:
    codec = stream.codec_context
    wanted = {target.pts: target.index for target in run.targets}
    positions = {target.position for target in run.targets}
    first_pts = int(table.pts[run.start])
    last = run.targets[-1].position

    def keep(frames: list[Any]) -> None:
        for frame in frames:
            if frame.is_corrupt and frame.pts is not None and frame.pts >= first_pts:
                raise _OffPlan
            index = wanted.pop(frame.pts, None)
            if index is not None:
                collect.add(index, frame)

    skipping = None
    for position, packet in _packets_from(container, stream, table, run.start):
        if can_skip and skipping is not (position not in positions):
            skipping = position not in positions
            codec.skip_frame = "NONREF" if skipping else "DEFAULT"
        keep(codec.decode(packet))
        if position >= last or not wanted:
            break
    if wanted:
        keep(codec.decode(None))
    if wanted:
        raise _OffPlan


def _packets_from(container: Any, stream: Any, table: PacketTable, start: int) -> Iterator[tuple[int, Any]]:
    """(decode position, packet) from `start` on. A seek may land early or late: where it did is looked up."""
    earliest = min(int(table.pts.min()), int(table.dts.min()))
    for seek_to in dict.fromkeys((int(table.pts[start]), int(table.dts[start]), earliest)):
        try:
            container.seek(seek_to, stream=stream, backward=True)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            continue
        packets = video_packets(container, stream)
        first = next(packets, None)
        landed = np.flatnonzero(table.pts == (first.pts if first is not None else None))
        if len(landed) and landed[0] <= start:
            numbered = enumerate(chain((first,), packets), int(landed[0]))
            return dropwhile(lambda item: item[0] < start, numbered)
    raise _OffPlan


def _skips_exactly(codec: Any) -> bool:
    """Whether "non-reference" means that no other frame needs it, so that the decoder may leave it out.

    HEVC calls frames so that higher temporal layers may still refer to: exact only in streams of one layer
    (ISO/IEC 14496-15, numTemporalLayers of the decoder configuration record).
    """
    if codec.name == "hevc":
        record = codec.extradata
        return record is not None and len(record) > 21 and record[0] == 1 and (record[21] >> 3) & 7 == 1
    return codec.name in ("h264", "mpeg1video", "mpeg2video")


def _decode_sequentially(
    source: MediaSource, sampling: FrameSampling, *, name: str, limits: DecodeLimits, transform: Transform | None
) -> VideoFrames:
    """Decode every frame to count them, then again up to the last sampled one; two passes keep memory flat."""
    with open_video(source, name=name, limits=limits, decode_first=True) as (container, stream):
        pts: list[int | None] = [frame.pts for frame in _all_frames(container, stream, name=name, limits=limits)]
        fps = average_fps(stream) or 25.0
        times_s = _times_s(pts, float(stream.time_base), fps)
        check_complete(container, stream, times_s, name=name)
        if not len(times_s):
            raise CorruptMediaError(f"{name}: not one frame of its video stream decodes; copy or re-encode it")
        info = media_info(container, stream, num_frames=len(times_s))
    indices = _choose(sampling, times_s, fps, name=name, limits=limits)
    wanted = set(indices.tolist())
    collect = _Collector(name=name, limits=limits, transform=transform)
    with open_video(source, name=name, limits=limits, decode_first=True) as (container, stream):
        for index, frame in enumerate(_all_frames(container, stream, name=name, limits=limits)):
            if index in wanted:
                collect.add(index, frame)
            if index >= indices[-1]:
                break
    return collect.result(indices, times_s, info)


def _all_frames(container: Any, stream: Any, *, name: str, limits: DecodeLimits) -> Iterator[Any]:
    number = 0
    try:
        for packet in chain(video_packets(container, stream), (None,)):
            for frame in stream.codec_context.decode(packet):
                if frame.is_corrupt:
                    raise CorruptMediaError(f"{name}: frame {number} is damaged; copy or re-encode the file")
                number += 1
                if number > limits.max_packets:
                    raise MediaLimitError(f"{name}: more than {limits.max_packets=} frames; cut it")
                yield frame
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise CorruptMediaError(
            f"{name}: frame {number} does not decode ({reason(error)}); copy or re-encode it"
        ) from error


def _times_s(pts: list[int | None], time_base: float, fps: float) -> npt.NDArray[np.float64]:
    """Times as the frames carry them; where any has none or they run backwards, the average rate instead."""
    known = [time for time in pts if time is not None]
    if len(known) == len(pts) and all(early <= late for early, late in pairwise(known)):
        return np.asarray(known, np.float64) * time_base
    return np.arange(len(pts), dtype=np.float64) / fps
