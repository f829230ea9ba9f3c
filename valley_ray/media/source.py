"""What goes into a decoder and what its header says: media sources, limits and media information."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from valley_ray.config import Config
from valley_ray.errors import SourceNotFoundError

MediaSource = Path | bytes
"""A file, a folder of frame images, or the bytes of a file."""

MediaKind = Literal["video", "image", "frames"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Lower-case endings of the frames of a folder."""

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class DecodeLimits(Config):
    """What a file may ask for; checked on its header before anything is decoded."""

    max_pixels: int = Field(default=36_000_000, ge=1)
    """Width times height of a frame, pixels; the default takes 8K video (7680x4320)."""
    max_streams: int = Field(default=64, ge=1)
    """Streams in a container."""
    max_duration_s: float = Field(default=6 * 3600.0, gt=0)
    """Length that the container announces, seconds."""
    max_packets: int = Field(default=2_000_000, ge=1)
    """Packets of the video stream (files of a frame folder)."""
    max_frames: int = Field(default=4096, ge=1)
    """Frames that one request may take."""
    max_output_bytes: int = Field(default=1 << 30, ge=1)
    """Bytes of the frames that one request may take, after cropping."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file says about itself, without decoding it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: MediaKind
    num_frames: _Count | None
    """Frames that are shown; None where only decoding tells (animated GIF, streams without times)."""
    fps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Average frames per second; 0 for images and frame folders."""
    width: _Count
    """Coded width, pixels, before rotation."""
    height: _Count
    """Coded height, pixels, before rotation."""
    duration_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """Length of the container, seconds; None where it does not say."""
    stream_index: _Count | None
    """Index of the video stream that is read; None for images."""
    codec: Annotated[str, Field(max_length=64)]
    """Codec or image format name."""
    num_streams: _Count
    """Streams in the container."""
    rotation: Annotated[int, Field(ge=-360, le=360)] | None = None
    """Degrees counter-clockwise that turn the coded picture upright; None where no decoded frame has told."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as shown, pixels."""
        turned = bool((self.rotation or 0) % 180)
        return (self.height, self.width) if turned else (self.width, self.height)


_MEDIA_INFO = TypeAdapter(MediaInfo)


def parse_media_info(fields: object) -> MediaInfo:
    """Media information from the fields that another process sent; raises ValueError unless each is of its range."""
    return _MEDIA_INFO.validate_python(fields)


def frame_files(folder: Path, *, order: Literal["name", "directory"] = "name") -> list[Path]:
    """The images of a folder, which may have none: sorted by name, or as the directory lists them."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted(found) if order == "name" else found


def source_name(source: MediaSource, name: str | None = None) -> str:
    """The name that messages carry, on one line: `name`, else the file's name."""
    shown = name if name is not None else (source.name if isinstance(source, Path) else "media bytes")
    return shown if shown.isprintable() else repr(shown)


def source_size(source: MediaSource, *, name: str) -> int:
    """Bytes of a file or of the given bytes; raises SourceNotFoundError where there is no readable file."""
    if isinstance(source, bytes):
        return len(source)
    try:
        return source.stat().st_size
    except (OSError, ValueError) as error:
        raise SourceNotFoundError(f"{name}: cannot be read ({_reason(error)}); check the path") from error


def read_head(source: MediaSource, *, name: str, num_bytes: int = 32) -> bytes:
    """The first bytes of a file; raises SourceNotFoundError where it cannot be read."""
    if isinstance(source, bytes):
        return source[:num_bytes]
    try:
        with source.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise SourceNotFoundError(f"{name}: cannot be read ({_reason(error)}); check the path") from error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
