"""Still images and folders of frame images, with PIL."""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from valley_ray.errors import CorruptMediaError, EmptyMediaError, MediaLimitError, SamplingError, TruncatedMediaError
from valley_ray.media.container import check_pixels
from valley_ray.media.frames import VideoFrames
from valley_ray.media.pyav_backend import Transform
from valley_ray.media.sampling import FrameSampling, frame_indices
from valley_ray.media.source import IMAGE_SUFFIXES, DecodeLimits, MediaInfo, MediaSource, frame_files, source_size

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_EXIF_ORIENTATION = 0x0112
_EXIF_ROTATIONS = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
"""Degrees counter-clockwise by the value of the orientation tag (Exif 2.3, 4.6.4), its mirroring left out."""


def is_image(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a PNG, JPEG, WebP or BMP image; GIF counts as video."""
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == b"\0\0\0\0")
    )


def probe_image(source: MediaSource, *, name: str, limits: DecodeLimits) -> MediaInfo:
    """The header of an image; raises CorruptMediaError or MediaLimitError."""
    with _open(source, name=name, limits=limits) as image:
        return _info(image)


def decode_image(source: MediaSource, *, name: str, limits: DecodeLimits, transform: Transform | None) -> VideoFrames:
    """One frame [1, H, W, 3], whatever the sampling, turned upright by its EXIF orientation."""
    frame_HWC, info = _read(source, name=name, limits=limits)
    if transform is not None:
        frame_HWC = transform(frame_HWC)
    return VideoFrames(frame_HWC[None], np.zeros(1), info)


def list_frames(
    folder: Path, *, name: str, limits: DecodeLimits, order: Literal["name", "directory"] = "name"
) -> list[Path]:
    """The images of a folder, sorted by name or (upstream, valley/util/data_util.py) as the directory lists them."""
    found = frame_files(folder, order=order)
    if not found:
        raise EmptyMediaError(f"{name}: a folder without images ({', '.join(IMAGE_SUFFIXES)})")
    if len(found) > limits.max_packets:
        raise MediaLimitError(f"{name}: {len(found)} images are more than {limits.max_packets=}")
    return found


def probe_folder(folder: Path, *, name: str, limits: DecodeLimits) -> MediaInfo:
    """The first image's header and the number of images."""
    found = list_frames(folder, name=name, limits=limits)
    first = probe_image(found[0], name=f"{name}/{found[0].name}", limits=limits)
    return replace(first, kind="frames", num_frames=len(found))


def decode_folder(
    folder: Path, sampling: FrameSampling, *, name: str, limits: DecodeLimits, transform: Transform | None
) -> VideoFrames:
    """The sampled images of a folder; times are zero, as images have none.

    Raises:
        SamplingError: frames per second or a window in seconds of images without times.
        CorruptMediaError: an image does not decode, or sizes differ and no transform makes them equal.
    """
    if sampling.start_s is not None or sampling.end_s is not None:
        raise SamplingError(f"{name}: a folder of images has no times; drop start_s and end_s")
    found = list_frames(folder, name=name, limits=limits, order=sampling.folder_order)
    indices = frame_indices(sampling, num_frames=len(found), fps=0.0)
    frames: dict[int, npt.NDArray[np.uint8]] = {}
    infos: list[MediaInfo] = []
    for index in dict.fromkeys(indices.tolist()):
        frame_HWC, info = _read(found[index], name=f"{name}/{found[index].name}", limits=limits)
        infos.append(info)
        frames[index] = frame_HWC if transform is None else transform(frame_HWC)
    if len({frame.shape for frame in frames.values()}) > 1:
        raise CorruptMediaError(f"{name}: its images differ in size; ask for a crop that makes them equal")
    frames_THWC = np.stack([frames[index] for index in indices.tolist()])
    if frames_THWC.nbytes > limits.max_output_bytes:
        raise MediaLimitError(f"{name}: its frames are more than {limits.max_output_bytes=}; sample fewer")
    return VideoFrames(frames_THWC, np.zeros(len(indices)), replace(infos[0], kind="frames", num_frames=len(found)))


def _read(source: MediaSource, *, name: str, limits: DecodeLimits) -> tuple[npt.NDArray[np.uint8], MediaInfo]:
    from PIL import ImageOps

    with _open(source, name=name, limits=limits) as image:
        try:
            rotation = _EXIF_ROTATIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1), 0)
            info = _info(image, rotation=rotation)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB")), info
        except (OSError, SyntaxError, ValueError) as error:
            if "truncated" in str(error):
                raise TruncatedMediaError(f"{name}: the image is cut off; copy the file again") from error
            raise CorruptMediaError(f"{name}: the image does not decode ({_line(error)}); copy it again") from error


def _info(image: Any, *, rotation: int | None = None) -> MediaInfo:
    codec = (image.format or "").lower()
    return MediaInfo("image", 1, 0.0, image.width, image.height, None, None, codec, 1, rotation)


def _open(source: MediaSource, *, name: str, limits: DecodeLimits) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not source_size(source, name=name):
        raise EmptyMediaError(f"{name}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaLimitError(f"{name}: {_line(error)}") from error
    except UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise CorruptMediaError(f"{name}: no image of a known format ({known}); copy or convert it again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptMediaError(f"{name}: the image header cannot be read ({_line(error)}); copy it again") from error
    check_pixels(image.width, image.height, name=name, limits=limits)
    return image


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
