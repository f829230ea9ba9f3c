"""VideoFrames: what every decoder returns. T frames, H height, W width, C = 3 colours (RGB)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from valley_ray.media.source import MediaInfo


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames of one clip in presentation order, upright (container rotation applied)."""

    frames_THWC: npt.NDArray[np.uint8]
    """uint8 [T, H, W, 3], RGB. H = W = S of a crop, except one that keeps the shape of the picture."""
    pts_seconds: npt.NDArray[np.float64]
    """float64 [T]; presentation time of each frame on its container's clock; zeros for images."""
    info: MediaInfo | None = None
    """What the container said of the whole file that they were taken from."""

    def __post_init__(self) -> None:
        shape = self.frames_THWC.shape
        assert len(shape) == 4, f"want [T, H, W, 3], got {shape}"
        assert shape[3] == 3, f"want [T, H, W, 3], got {shape}"
        assert self.frames_THWC.dtype == np.uint8, f"want uint8, got {self.frames_THWC.dtype}"
        assert self.pts_seconds.shape == (len(self.frames_THWC),), (
            f"want one time per frame, got {self.pts_seconds.shape}"
        )

    def __len__(self) -> int:
        return len(self.frames_THWC)
