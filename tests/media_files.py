"""Small real media for tests, encoded with PyAV: every frame differs, so that a wrong frame is seen."""

from pathlib import Path

import av
import numpy as np


def write_clip(
    path: Path,
    *,
    codec: str = "libx264",
    num_frames: int = 60,
    size_wh: tuple[int, int] = (64, 48),
    fps: int = 30,
    gop: int | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Encode a moving, brightening texture; the container is chosen by the suffix of `path`."""
    width, height = size_wh
    texture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if gop is not None:
            stream.codec_context.gop_size = gop
        for index in range(num_frames):
            picture = np.roll(texture, 3 * index, axis=1) // 2 + np.uint8(index % 120)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path, *, seconds: float = 1.0) -> Path:
    """Encode silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, int(44100 * seconds)), np.float32), format="fltp", layout="mono"
        )
        frame.rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of the best video stream, upright, and its time: the plain sequential decode."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        shown = list(container.decode(stream))
        pictures = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in shown]
        return np.stack(pictures), np.asarray([frame.time for frame in shown])
