"""What one stage of a run trains, for how long and how fast; knows no torch and no Ray."""

from typing import Annotated, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from valley_ray.config import Config

Part = Literal[
    "projector",
    "temporal",
    "tower",
    "new_embeddings",
    "embeddings",
    "layers",
    "lm_head",
    "language_model",
    "lora",
]
"""A set of parameters that a stage can train; `valley_ray.train.stages.holders` says which parameters each one holds.

temporal: weights of the pooling; tower: the vision tower, as far as features depend on it; new_embeddings: rows of the
seven added tokens; layers: decoder blocks and final norm; language_model: embeddings, layers and lm_head; lora:
adapters of the language model's layers."""

Parts = tuple[Part, ...]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]

Preset = Literal["valley-stage1", "valley-stage2", "valley-stage2-lora"]

PRESETS: dict[str, Parts] = {
    "valley-stage1": ("projector", "embeddings"),
    "valley-stage2": ("projector", "embeddings", "layers", "temporal"),
    "valley-stage2-lora": ("projector", "embeddings", "lora"),
}
"""What the original's three training scripts train (parity note 21); temporal only where the pooling has weights."""


class StageConfig(Config):
    """One stage: what is trained, for how long, how fast."""

    name: str = Field(min_length=1)
    """Shown in metrics, progress lines and timings."""
    trainable: tuple[Part | Preset, ...] = Field(min_length=1)
    """Parts that are trained, or names of presets; everything else is frozen."""
    learning_rate: Rate
    """Peak learning rate of every trained part that `learning_rates` does not name."""
    learning_rates: dict[Part, Rate] = Field(default_factory=dict)
    """Peak learning rate of single parts, for example {projector: 2.0e-3}."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: cosine down to zero at the planned last step, or no change."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the planned steps in which the learning rate grows linearly to its peak."""
    epochs: int | None = Field(default=None, ge=1)
    """How often every sample is seen, exactly. Set this or `max_steps`."""
    max_steps: int | None = Field(default=None, ge=1)
    """How many optimizer steps are made. Set this or `epochs`."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW weight decay of matrices; vectors (norms, biases) and embeddings' new rows are never decayed."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Gradients are clipped to this global norm; None means off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"set exactly one of epochs and max_steps, got {self.epochs=} {self.max_steps=}")
        unknown = sorted(set(self.learning_rates) - self.parts)
        if unknown:
            raise ValueError(f"learning_rates names parts that this stage does not train: {', '.join(unknown)}")
        if "new_embeddings" in self.parts and (whole := sorted({"embeddings", "language_model"} & self.parts)):
            raise ValueError(
                f"new_embeddings are rows of the table that {', '.join(whole)} trains whole; leave one out"
            )
        return self

    @field_validator("trainable", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def parts(self) -> frozenset[Part]:
        """Trained parts, presets written out."""
        return frozenset(part for name in self.trainable for part in cast("Parts", PRESETS.get(name, (name,))))


def valley_stages() -> tuple[StageConfig, ...]:
    """Valley's two stages (paper section 4; upstream's experiments): the projector alone, then with the LLM."""
    return (
        StageConfig(name="stage1", trainable=("projector",), learning_rate=2e-3, epochs=1),
        StageConfig(name="stage2", trainable=("projector", "language_model"), learning_rate=2e-5, epochs=3),
    )
