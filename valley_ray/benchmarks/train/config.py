"""What a user of jobs/benchmark_train.py sets. Knows no torch and no Ray."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from valley_ray.config import Config


class TrainCost(Config):
    """What is timed."""

    model: Literal["small", "llama7b-shape", "tiny-shape"] = "small"
    """small: packing and the three modes of feeding, on the CPU. A shape: packed steps of a random model of it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the steps of a shape run; `small` runs on the CPU."""
    clips: Path = Path("runs/benchmark_train")
    """Where generated clips are kept for the next time."""
    num_rounds: int = Field(default=3, ge=1)
    """Rounds of the three modes; medians over them are reported."""
    num_rounds_packing: int = Field(default=5, ge=1)
    """Rounds of packed against padded."""
    num_samples: int = Field(default=256, ge=32, multiple_of=16)
    """Samples of a round from shards and in overlap, each with a video under a name of its own."""
    num_samples_in_process: int = Field(default=48, ge=16, multiple_of=16)
    """Samples of a round in which the loop decodes by itself; its rate does not change over time."""
    stage: Literal["valley-stage1", "valley-stage2", "valley-stage2-lora"] = "valley-stage2"
    """What the steps of a shape train."""
    pack_tokens: int = Field(default=4096, ge=512)
    """Tokens of a row of a shape's steps."""
    num_rows: int = Field(default=4, ge=1)
    """Rows of a shape's step."""
    num_steps: int = Field(default=8, ge=1)
    """Steps of a shape that are timed, after two that are not."""
    gradient_checkpointing: bool = True
    """Keep no activations of a shape's layers."""
    offload: bool = False
    """Keep a shape's optimizer state in the memory of the machine."""
    peak_flops: float | None = Field(default=None, gt=0)
    """FLOP per second that MFU is taken of; None: what is known of the GPU."""
