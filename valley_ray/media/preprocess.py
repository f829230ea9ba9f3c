"""Frames become crops and crops become pixel values. T frames, H height, W width, S crop side, C = 3 colours.

numpy and PIL only: the resampling filters of PIL are part of the recorded results, so no other library may stand in.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from valley_ray.config import Config
from valley_ray.errors import ConfigError
from valley_ray.media.resample import resized_part


class Crop(Config):
    """How a frame is brought to the size that the tower takes (upstream: videos 256 bilinear, images 224 bicubic)."""

    size: int = Field(default=224, ge=1, le=4096)
    """S, side of the square that comes out, pixels; of `keep`, the longest that the short side gets."""
    short_side: int = Field(default=256, ge=1, le=4096)
    """Length of the short side after resizing, pixels; at least `size`. Of `crop` only."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """PIL filter."""
    corner: Literal["rounded", "floored"] = "rounded"
    """How half a pixel is cut: rounded half to even (upstream's videos) or floored (CLIP). Of `crop` only."""
    fit: Literal["crop", "stretch", "keep"] = "crop"
    """crop: resize the short side, cut the centre square. stretch: resize to the square, whatever the shape
    (ChineseCLIP's processor). keep: resize only, the short side to `size` or so that the long side stays within twice
    of it: frames of many shapes (upstream's `image_aspect_ratio: keep`), which a tower of one size cannot take."""

    @model_validator(mode="after")
    def _check(self) -> "Crop":
        if self.fit == "crop" and self.short_side < self.size:
            raise ValueError(f"short_side must be at least size, got {self.short_side=} {self.size=}")
        return self

    @property
    def key(self) -> str:
        """Stable text that names this crop in cache keys; crops that give equal pixels have equal keys."""
        if self.fit == "crop":
            return f"{self.resample}{self.short_side}-{self.size}-{self.corner}"
        return f"{self.resample}-{self.fit}{self.size}"

    @property
    def is_square(self) -> bool:
        """Whether every frame comes out as S x S."""
        return self.fit != "keep"


def check_one_size(**crops: Crop) -> None:
    """Raise ConfigError, with the crop's name, where one gives frames of many sizes: a vision tower takes one."""
    for name, crop in crops.items():
        if not crop.is_square:
            raise ConfigError(
                f"the processor's {name} has fit={crop.fit}, which gives frames of many sizes, but a tower takes one; "
                "set it to crop or stretch"
            )


def resize_and_crop(frames_THWC: npt.NDArray[np.uint8], crop: Crop) -> npt.NDArray[np.uint8]:
    """uint8 [T, H, W, 3], T at least 1 -> uint8 [T, S, S, 3]; [T, H', W', 3] where the crop keeps the shape."""
    return np.stack([resize_and_crop_frame(frame_HWC, crop) for frame_HWC in frames_THWC])


def resize_and_crop_frame(frame_HWC: npt.NDArray[np.uint8], crop: Crop) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [S, S, 3], or [H', W', 3] where the crop keeps the shape."""
    from PIL import Image

    height, width = frame_HWC.shape[:2]
    new_size = _resized(width, height, crop)
    cut = round if crop.corner == "rounded" else math.floor
    left, top = cut((new_size[0] - crop.size) / 2), cut((new_size[1] - crop.size) / 2)
    part = (left, top, left + crop.size, top + crop.size)
    if crop.fit == "crop" and crop.resample == "bilinear":
        return resized_part(frame_HWC, new_size, part)
    resample = Image.Resampling.BILINEAR if crop.resample == "bilinear" else Image.Resampling.BICUBIC
    resized = Image.fromarray(np.ascontiguousarray(frame_HWC)).resize(new_size, resample)
    return np.asarray(resized.crop(part) if crop.fit == "crop" else resized)


def _resized(width: int, height: int, crop: Crop) -> tuple[int, int]:
    """Width and height before anything is cut.

    The long side is truncated, as in upstream's load_video (video_transform.py) and CLIP's image processor; the short
    side of `keep` is that of upstream's valley/data/dataset.py, which names 448 and 224.
    """
    if crop.fit == "stretch":
        return crop.size, crop.size
    short, long = min(width, height), max(width, height)
    new_short = crop.short_side
    if crop.fit == "keep":
        new_short = max(1, int(min(2 * crop.size / (long / short), crop.size)))
    new_long = max(new_short, int(new_short * long / short))
    return (new_long, new_short) if height < width else (new_short, new_long)


def normalize(
    frames_THWC: npt.NDArray[np.uint8], *, mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float32]:
    """uint8 [T, H, W, 3] in 0..255 -> float32 [T, 3, H, W]: scaled to 0..1, then (x - mean) / std per colour."""
    num_frames, height, width, num_colors = frames_THWC.shape
    pixels_TCHW = np.empty((num_frames, num_colors, height, width), np.float32)
    means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for frame_HWC, pixels_CHW in zip(frames_THWC, pixels_TCHW, strict=True):
        for color, plane_HW in enumerate(pixels_CHW):  # one colour of one frame at a time stays in the cache
            plane_HW[...] = frame_HWC[..., color]
            plane_HW /= np.float32(255)
            plane_HW -= means[color]
            plane_HW /= stds[color]
    return pixels_TCHW
