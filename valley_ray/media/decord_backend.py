"""decord backend: upstream's reader, named so that its pixels can be had; single-threaded.

Measured of 0.6.0: it counts discarded pre-roll packets of stream-copied clips, so that other frames are shown; repeats
frames near the end of HEVC; shows 10 bits some levels off; and reads no AV1 and no GIF. The PyAV backend is the default
for these reasons; where none applies, their pixels are equal. Headers are checked with PyAV first.
"""

import io
import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from valley_ray.errors import ConfigError, CorruptMediaError, MediaLimitError
from valley_ray.media.container import media_info, open_video
from valley_ray.media.frames import VideoFrames
from valley_ray.media.pyav_backend import Transform
from valley_ray.media.sampling import FrameSampling, frame_indices, window_frames
from valley_ray.media.source import DecodeLimits, MediaSource

_FRAMES_AT_ONCE = 8


def decode_video(
    source: MediaSource, sampling: FrameSampling, *, name: str, limits: DecodeLimits, transform: Transform | None
) -> VideoFrames:
    """The sampled frames as decord shows them.

    Raises:
        ConfigError: decord is not installed (it has no wheel for this machine).
        MediaError: as the PyAV backend; whatever decord refuses is a CorruptMediaError.
    """
    try:
        import decord
    except ImportError as error:
        raise ConfigError("decord is not installed here; use the decoder 'pyav'") from error
    with open_video(source, name=name, limits=limits) as (container, stream):
        info = media_info(container, stream, num_frames=None)
    try:
        target = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source.absolute())
        reader = decord.VideoReader(target, num_threads=1)
        indices, times_s = _choose(reader, sampling, name=name, limits=limits)
        info = replace(info, num_frames=len(reader))
        frames_THWC = _read(reader, indices, name=name, limits=limits, transform=transform)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        # decord's own words are stack traces with the paths of its build machine: kept as the cause only.
        raise CorruptMediaError(f"{name}: decord cannot read it; use the decoder 'pyav' or re-encode it") from error
    return VideoFrames(frames_THWC, times_s, info)


def _read(
    reader: Any, indices: npt.NDArray[np.int64], *, name: str, limits: DecodeLimits, transform: Transform | None
) -> npt.NDArray[np.uint8]:
    """uint8 [T, H, W, 3]; a few frames at a time, so that memory holds few of full size."""
    frames: list[npt.NDArray[np.uint8]] = []
    num_bytes = 0
    for first in range(0, len(indices), _FRAMES_AT_ONCE):
        batch = reader.get_batch(indices[first : first + _FRAMES_AT_ONCE].tolist()).asnumpy()
        frames.extend(batch if transform is None else [transform(frame_HWC) for frame_HWC in batch])
        num_bytes += sum(frame.nbytes for frame in frames[first:])
        if num_bytes > limits.max_output_bytes:
            raise MediaLimitError(f"{name}: its frames are more than {limits.max_output_bytes=}; sample fewer")
    return np.stack(frames)


def _choose(
    reader: Any, sampling: FrameSampling, *, name: str, limits: DecodeLimits
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Indices int64 [T] and times float64 [T] of the sampled frames, by decord's own count and clock."""
    num_frames = len(reader)
    stamps = np.asarray(reader.get_frame_timestamp(range(num_frames)), np.float64).reshape(num_frames, -1)[:, 0]
    first, last = window_frames(sampling, stamps, name=name)
    fps = float(reader.get_avg_fps())
    indices = first + frame_indices(sampling, num_frames=last - first, fps=fps)
    if len(indices) > limits.max_frames:
        raise MediaLimitError(f"{name}: {len(indices)} frames are more than {limits.max_frames=}; sample fewer")
    return indices, stamps[indices]
