"""QuickstartConfig: how large the quickstart is. Its defaults reach the numbers of the README on two CPU cores."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from valley_ray.config import Config
from valley_ray.nano.backbones import NanoConfig
from valley_ray.nano.make import WorldConfig
from valley_ray.train.stage_config import StageConfig


def nano_stages() -> tuple[StageConfig, ...]:
    """Valley's two stages, at rates and lengths for the nano model."""
    return (
        StageConfig(
            name="stage1",
            trainable=("projector",),
            learning_rate=5e-3,
            max_steps=70,
            warmup_ratio=0.1,
            betas=(0.9, 0.98),
        ),
        StageConfig(
            name="stage2",
            trainable=("projector", "language_model"),
            learning_rate=1.5e-3,
            max_steps=230,
            warmup_ratio=0.1,
            weight_decay=0.01,
            betas=(0.9, 0.98),
        ),
    )


class QuickstartConfig(Config):
    """Sizes of the quickstart; the defaults reach the numbers of the README on two CPU cores."""

    root: Path = Path("runs/quickstart")
    """Clips, backbones, shards, metrics and report; what an earlier quickstart left there is replaced."""
    model: Path = Path("models/nano")
    """The trained model folder."""
    world: WorldConfig = WorldConfig()
    """Clips and questions."""
    nano: NanoConfig = NanoConfig()
    """Backbones."""
    stages: tuple[StageConfig, ...] = Field(default_factory=nano_stages)
    """Training."""
    global_batch_size: int = Field(default=48, ge=1)
    """Samples per step."""
    num_workers: int = Field(default=2, ge=1)
    """Training workers, one thread each."""
    num_served: int = Field(default=40, ge=0)
    """Held-out clips that are asked about over HTTP; 0 leaves serving out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What the training would refuse, said before the minutes that lead there."""
        if self.global_batch_size % self.num_workers:
            raise ValueError(
                f"global_batch_size must be a multiple of num_workers, got {self.global_batch_size=} "
                f"{self.num_workers=}; change one of them"
            )
        return self
