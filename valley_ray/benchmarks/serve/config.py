"""What a user of jobs/benchmark_serve.py sets."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from valley_ray.benchmarks.engine_cost import EngineCost

Part = Literal["engines", "worker", "video", "shapes", "hops"]


class ServeCost(EngineCost):
    """What is timed: engines by themselves, and whole servers over HTTP."""

    parts: tuple[Part, ...] = ("engines", "worker", "video", "shapes", "hops")
    """What is measured; the keys of the others are null."""
    folder: Path = Path("runs/benchmark_serve")
    """Where generated clips are kept for the next time."""
    clip_s: float = Field(default=10.0, ge=0.5)
    """Length of a video, seconds of 640x360."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of torch in every process, those of the one-request-at-a-time worker and of ours alike."""
    server_hidden_size: int = Field(default=512, ge=64, multiple_of=64)
    """D of the served model."""
    server_num_layers: int = Field(default=8, ge=1)
    """Layers of its language model; with the defaults 26 million parameters in all."""
    num_pulls: int = Field(default=200, ge=10)
    """Pulls from decoder to sampler whose time is taken, with no work inside."""
