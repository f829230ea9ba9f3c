"""Small real inputs for the data tests: H.264 clips whose brightness names clip and frame, and their records."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SIDE = 32
NUM_FRAMES = 8


def write_clip(path: Path, *, brightness: int, num_frames: int = NUM_FRAMES) -> Path:
    """A grey clip of SIDE x SIDE; frame i has brightness + i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 8)
        for index in range(num_frames):
            pixels = np.full((SIDE, SIDE, 3), brightness + index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def turns(question: str = "<video>\nWhat is moving?", answer: str = "A red circle moves left.") -> list[dict[str, str]]:
    """A conversation in the words of tests/tiny.py's tokenizer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """A LLaVA / Valley JSON list."""
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
