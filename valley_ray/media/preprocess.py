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


class Crop(Config):
    """Resize the short side, then cut the centre square (upstream: videos 256 bilinear, images 224 bicubic)."""

    size: int = Field(default=224, ge=1, le=4096)
    """Side of the square that is cut, pixels."""
    short_side: int = Field(default=256, ge=1, le=4096)
    """Length of the short side after resizing, pixels; at least `size`."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """PIL filter."""
    corner: Literal["rounded", "floored"] = "rounded"
    """How half a pixel is cut: rounded half to even (upstream's videos), or floored (CLIP's image processor)."""

    @model_validator(mode="after")
    def _check(self) -> "Crop":
        if self.short_side < self.size:
            raise ValueError(f"short_side must be at least size, got {self.short_side=} {self.size=}")
        return self

    @property
    def key(self) -> str:
        """Stable text that names this crop in cache keys."""
        return f"{self.resample}{self.short_side}-{self.size}-{self.corner}"


def resize_and_crop(frames_THWC: npt.NDArray[np.uint8], crop: Crop) -> npt.NDArray[np.uint8]:
    """uint8 [T, H, W, 3] -> uint8 [T, S, S, 3]."""
    cropped = np.empty((len(frames_THWC), crop.size, crop.size, 3), np.uint8)
    for index, frame_HWC in enumerate(frames_THWC):
        cropped[index] = resize_and_crop_frame(frame_HWC, crop)
    return cropped


def resize_and_crop_frame(frame_HWC: npt.NDArray[np.uint8], crop: Crop) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [S, S, 3]; the arithmetic of upstream's load_video (video_transform.py).

    The long side is truncated, as there and in CLIP's image processor.
    """
    from PIL import Image

    height, width = frame_HWC.shape[:2]
    if height < width:
        new_width, new_height = max(crop.short_side, int(crop.short_side * width / height)), crop.short_side
    else:
        new_width, new_height = crop.short_side, max(crop.short_side, int(crop.short_side * height / width))
    resample = Image.Resampling.BILINEAR if crop.resample == "bilinear" else Image.Resampling.BICUBIC
    cut = round if crop.corner == "rounded" else math.floor
    left, top = cut((new_width - crop.size) / 2), cut((new_height - crop.size) / 2)
    resized = Image.fromarray(np.ascontiguousarray(frame_HWC)).resize((new_width, new_height), resample)
    return np.asarray(resized.crop((left, top, left + crop.size, top + crop.size)))


def normalize(
    frames_THWC: npt.NDArray[np.uint8], *, mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float32]:
    """uint8 [T, S, S, 3] in 0..255 -> float32 [T, 3, S, S]: scaled to 0..1, then (x - mean) / std per colour."""
    pixels_THWC = frames_THWC.astype(np.float32)
    pixels_THWC /= np.float32(255)
    pixels_THWC -= np.asarray(mean, np.float32)
    pixels_THWC /= np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels_THWC.transpose(0, 3, 1, 2))
