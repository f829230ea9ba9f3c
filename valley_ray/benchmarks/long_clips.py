"""Long clips as they are found on the web: H.264 by x264, a key frame every 250 frames. Knows no Ray, no torch.

Every clip shows another landscape of its own, over which the camera pans, and boxes that move across it.
"""

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

WIDTH, HEIGHT = 1920, 1080
"""Of a clip where nothing else is said."""
FRAMES_PER_SECOND = 25
"""Keeps eight evenly spread frames of a minute away from the key frames, at half a group of pictures on average."""
GROUP_SIZE = 250
"""x264's own default, frames."""
_MARGIN_WH = (1024, 512)
"""How far the camera can pan."""
_NUM_BOXES, _BOX_SIDE = 6, 160


def write_long_clip(
    path: Path, *, seed: int, num_bframes: int, seconds: float = 60.0, size_wh: tuple[int, int] = (WIDTH, HEIGHT)
) -> None:
    """Encode one clip; the folder must exist and the file appears when it is whole.

    Args:
        seed: clips of different seeds share no picture.
        num_bframes: B-frames between two others at most; x264 lets every second of them be referred to.
        size_wh: pixels, multiples of four, larger than a box.
    """
    unfinished = path.with_suffix(".part")
    random = np.random.default_rng(seed)
    planes = _landscape(random, size_wh)
    width, height = size_wh
    corners = random.integers(0, (width - _BOX_SIDE, height - _BOX_SIDE), (_NUM_BOXES, 2))
    speeds = 2 * random.integers(-6, 7, (_NUM_BOXES, 2))
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = GROUP_SIZE
        stream.codec_context.thread_count = 2
        stream.options = {"preset": "veryfast", "bf": str(num_bframes)}
        for index in range(round(seconds * FRAMES_PER_SECOND)):
            picture = _view(planes, size_wh, angle=seed + index / 200)
            for box, (left, top) in enumerate((corners + speeds * index) % (width - _BOX_SIDE, height - _BOX_SIDE)):
                picture[top : top + _BOX_SIDE, left : left + _BOX_SIDE] = (40 * box + index) % 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode(None))
    unfinished.rename(path)


def _landscape(random: np.random.Generator, size_wh: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Planes Y, U, V of a picture larger than the frame: noise at four scales, the coarser the fainter."""
    width, height = size_wh[0] + _MARGIN_WH[0], size_wh[1] + _MARGIN_WH[1]
    landscape = np.zeros((height, width, 3), np.float32)
    for num_cells, contrast in ((8, 0.42), (32, 0.28), (128, 0.18), (512, 0.12)):
        noise = random.integers(0, 256, (num_cells * height // width, num_cells, 3), dtype=np.uint8)
        landscape += contrast * np.asarray(Image.fromarray(noise).resize((width, height)), np.float32)
    frame = av.VideoFrame.from_ndarray(np.clip(landscape, 0, 255).astype(np.uint8), format="rgb24")
    stacked = frame.reformat(format="yuv420p").to_ndarray()
    luma, blue, red = np.split(stacked, (height, height + height // 4))
    return luma, blue.reshape(height // 2, width // 2), red.reshape(height // 2, width // 2)


def _view(
    planes: tuple[npt.NDArray[np.uint8], ...], size_wh: tuple[int, int], *, angle: float
) -> npt.NDArray[np.uint8]:
    """uint8 [H * 3 / 2, W], planes one below the other: the camera's view on its way around the landscape's middle."""
    left = int(_MARGIN_WH[0] / 4 * (1 + np.sin(angle)))
    top = int(_MARGIN_WH[1] / 4 * (1 + np.cos(angle)))
    width, height = size_wh
    picture = np.empty((height * 3 // 2, width), np.uint8)
    luma, blue, red = planes
    picture[:height] = luma[2 * top : 2 * top + height, 2 * left : 2 * left + width]
    for plane, first in ((blue, height), (red, height * 5 // 4)):
        cut = plane[top : top + height // 2, left : left + width // 2]
        picture[first : first + height // 4] = cut.reshape(height // 4, width)
    return picture
