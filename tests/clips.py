"""Small real videos for tests, encoded on the spot."""

from pathlib import Path

import av
import numpy as np


def write_clip(path: Path, *, seed: int = 0, num_frames: int = 12, side: int = 48, fps: int = 8) -> Path:
    """An H.264 file of `num_frames` frames of a square that moves over a coloured background; returns `path`."""
    generator = np.random.default_rng(seed)
    background, colour = generator.integers(0, 256, (2, 3), dtype=np.uint8)
    start = generator.integers(0, side // 2, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            frame = np.broadcast_to(background, (side, side, 3)).copy()
            row, column = (start + index) % (side - 12)
            frame[row : row + 12, column : column + 12] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
