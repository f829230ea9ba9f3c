"""Media files become frames: one interface over videos, images and folders of frame images, in this process.

Hostile files are for `valley_ray.media.sandbox`, which runs the same in a killable child. Knows no torch and no Ray.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from valley_ray.errors import ConfigError, DecodeMemoryError, EmptyMediaError
from valley_ray.media.frames import VideoFrames
from valley_ray.media.preprocess import Crop, resize_and_crop_frame
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.source import DecodeLimits, MediaInfo, MediaSource, read_head, source_name, source_size

__all__ = ["Backend", "DecodeLimits", "MediaInfo", "MediaSource", "frames", "probe"]

Backend = Literal["pyav", "decord"]
"""Video reader: pyav is exact on every container; decord gives upstream's pixels, with its faults."""


def probe(source: MediaSource, *, name: str | None = None, limits: DecodeLimits | None = None) -> MediaInfo:
    """What a file is and how many frames it shows, from its header and packets; nothing is decoded.

    Raises:
        SourceNotFoundError: there is no such file.
        MediaError: as `frames`, except that frames which do not decode are not noticed.
    """
    from valley_ray.media import images, pyav_backend

    name, limits = source_name(source, name), limits or DecodeLimits()
    with _memory_named(name):
        if isinstance(source, Path) and os.path.isdir(source):
            return images.probe_folder(source, name=name, limits=limits)
        if _starts_as_image(source, name=name):
            return images.probe_image(source, name=name, limits=limits)
        return pyav_backend.probe_video(source, name=name, limits=limits)


def frames(
    source: MediaSource,
    sampling: FrameSampling,
    *,
    name: str | None = None,
    backend: Backend = "pyav",
    crop: Crop | None = None,
    limits: DecodeLimits | None = None,
) -> VideoFrames:
    """The sampled frames of a video, an image (always one frame) or a folder of frame images.

    Args:
        name: what messages call the source; the file's name by default.
        crop: applied to each frame as it is decoded, so that memory holds one full-size frame at a time.

    Returns:
        frames uint8 [T, H, W, 3] (upright; with a crop H = W = S, or as its `fit` says) and their presentation times.

    Raises:
        SourceNotFoundError: there is no such file.
        EmptyMediaError, NotMediaError, NoVideoStreamError, TruncatedMediaError, CorruptMediaError, MediaLimitError:
            the file yields no frames; each message is one line with the file's name and the reason.
        DecodeMemoryError: it asks for more memory than this process can have.
        ConfigError: an unknown backend, or one that is not installed.
        SamplingError: the window holds no frame, or frames per second of media without a rate.
    """
    from valley_ray.media import images

    name, limits = source_name(source, name), limits or DecodeLimits()
    transform = partial(resize_and_crop_frame, crop=crop) if crop is not None else None
    with _memory_named(name):
        if isinstance(source, Path) and os.path.isdir(source):
            return images.decode_folder(source, sampling, name=name, limits=limits, transform=transform)
        if _starts_as_image(source, name=name):
            return images.decode_image(source, name=name, limits=limits, transform=transform)
        decode_video = _video_decoder(backend)
        return decode_video(source, sampling, name=name, limits=limits, transform=transform)


def _video_decoder(backend: Backend) -> Callable[..., VideoFrames]:
    # Imported when asked for: the parent of a sandbox loads no decoder.
    if backend == "pyav":
        from valley_ray.media import pyav_backend

        return pyav_backend.decode_video
    if backend == "decord":
        from valley_ray.media import decord_backend

        return decord_backend.decode_video
    raise ConfigError(f"unknown decoder {backend!r}; choose 'pyav' or 'decord'")


@contextmanager
def _memory_named(name: str) -> Iterator[None]:
    """A damaged header may ask for any amount of memory; say whose it was."""
    try:
        yield
    except MemoryError as error:
        raise DecodeMemoryError(f"{name}: decoding asks for more memory than it may have; re-encode it") from error


def _starts_as_image(source: MediaSource, *, name: str) -> bool:
    from valley_ray.media.images import is_image

    if not source_size(source, name=name):
        raise EmptyMediaError(f"{name}: the file is empty (0 bytes)")
    return is_image(read_head(source, name=name))
