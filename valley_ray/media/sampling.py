"""Which frames of a clip are looked at: a number of them or a rate, inside an optional window. Knows no decoder."""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from valley_ray.config import Config
from valley_ray.errors import SamplingError


class FrameSampling(Config):
    """Fixed number of frames or frames per second (exactly one of them), of the whole clip or a window of it."""

    num_frames: int | None = Field(default=8, ge=1, le=4096)
    """Frames spread evenly over the window, first and last included; short clips repeat frames. None with `fps`."""
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    """Frames per second of the clip; None with `num_frames`."""
    start_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Window start, seconds after the first frame of the clip; None: the clip's start."""
    end_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Window end (exclusive), seconds after the first frame of the clip; None: the clip's end."""
    folder_order: Literal["name", "directory"] = "name"
    """Order of the images of a folder: by name, or as the file system lists them, which may be any (upstream)."""

    @model_validator(mode="before")
    @classmethod
    def _rate_replaces_default_number(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("fps") is not None and "num_frames" not in values:
            return {**values, "num_frames": None}
        return values

    @model_validator(mode="after")
    def _check(self) -> "FrameSampling":
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(f"set exactly one of num_frames and fps, got {self.num_frames=} {self.fps=}")
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s must be after start_s, got {self.start_s=} {self.end_s=}")
        return self

    @property
    def key(self) -> str:
        """Stable text that names this sampling in cache keys; equal samplings have equal keys."""
        how = f"n{self.num_frames}" if self.num_frames is not None else f"fps{self.fps!r}"
        if self.folder_order != "name":
            how += f"-{self.folder_order}"
        if self.start_s is None and self.end_s is None:
            return how
        return f"{how}@{self.start_s or 0.0!r}-{self.end_s!r}"


def frame_indices(sampling: FrameSampling, *, num_frames: int, fps: float) -> npt.NDArray[np.int64]:
    """Indices of the sampled frames among `num_frames` frames shown at `fps`; the window is applied by the caller.

    Truncated linspace and `int(round(fps) / sampling.fps)` steps, as upstream's valley/util/data_util.py load_video:
    rounding would pick other frames.

    Returns:
        int64 [T], non-decreasing, in [0, num_frames).

    Raises:
        SamplingError: there is no frame to choose from, or fps mode on frames without a rate (`fps` 0).
    """
    if num_frames < 1:
        raise SamplingError("cannot sample a clip without frames; widen the window")
    if sampling.num_frames is not None:
        return np.linspace(0, num_frames - 1, sampling.num_frames).astype(np.int64)
    assert sampling.fps is not None, "the validator lets exactly one of num_frames and fps be None"
    if not fps > 0:
        raise SamplingError(
            f"cannot sample {sampling.fps} frames per second of media without a frame rate; set num_frames"
        )
    step = max(1, int(min(round(fps) / sampling.fps, num_frames)))  # a quotient may be infinite
    return np.arange(0, num_frames, step, dtype=np.int64)


def window_frames(sampling: FrameSampling, times_s: npt.NDArray[np.float64], *, name: str) -> tuple[int, int]:
    """The frames whose times lie in the sampling's window, as half-open [first, last) of `times_s`.

    Args:
        times_s: float64 [N], non-decreasing presentation times.
        name: the clip, for the message.

    Raises:
        SamplingError: no frame lies in the window.
    """
    offsets = times_s - times_s[0] if len(times_s) else times_s
    # Half a millisecond of slack: container times are rounded to milliseconds or coarser time bases.
    first = 0 if sampling.start_s is None else int(np.searchsorted(offsets, sampling.start_s - 5e-4))
    last = len(offsets) if sampling.end_s is None else int(np.searchsorted(offsets, sampling.end_s - 5e-4))
    if first >= last:
        length = f"{offsets[-1]:.3f} s after its first" if len(offsets) else "nowhere"
        raise SamplingError(
            f"{name}: no frame between start_s={sampling.start_s} and end_s={sampling.end_s}; the last is {length}"
        )
    return first, last
