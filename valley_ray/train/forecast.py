"""What a run will train and how much memory that takes, from the model folder's configuration alone.

The model is built on torch's meta device: shapes without numbers, seven billion of them in a second. P parameters of
the engine's module, T trained ones, W workers; L layers, D width, I inner width, V vocabulary, N tokens of a
micro-batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from valley_ray.train.config import TrainConfig
from valley_ray.train.export import put_trained
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import ParameterGroup, holders, prepare_stage

if TYPE_CHECKING:
    from valley_ray.model import ValleyForConditionalGeneration
    from valley_ray.model.config import ValleyConfig

MAX_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket (train/zero.py)."""

QUANTIZED_BYTES = 4.5 / 8
"""Of a weight in NF4: 4 bits, and a float32 scale for every 64 of them."""

MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 gathers at a time (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class TrainedPart:
    """Parameters of one part that a stage trains."""

    part: str
    num_parameters: int
    learning_rate: float


@dataclass(frozen=True)
class StageForecast:
    """What one stage trains."""

    name: str
    parts: tuple[TrainedPart, ...]
    num_module: int
    """Parameters of the module that the engine wraps."""
    num_quantized: int
    """Those of them that 4-bit codes stand for (QLoRA)."""
    num_outside: int
    """Parameters of a frozen tower, which stands outside."""

    @property
    def num_trained(self) -> int:
        """Trained parameters of all parts."""
        return sum(part.num_parameters for part in self.parts)


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    tower: int
    activations: int
    """An estimate for the longest micro-batch, at its upper end."""
    host: int
    """Bytes on the host instead of the device, with offload."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.tower + self.activations


def meta_model(
    model_config: "ValleyConfig", config: TrainConfig, stage: StageConfig
) -> "ValleyForConditionalGeneration":
    """The model of a stage on the meta device, with an adapter where the stage trains one.

    Raises:
        ConfigError: the adapter does not fit the model.
        CheckpointError: the configuration describes no model that can be built.
    """
    from valley_ray.errors import CheckpointError
    from valley_ray.model import ValleyForConditionalGeneration

    with torch.device("meta"):
        try:
            model = ValleyForConditionalGeneration(model_config)
        except (RuntimeError, ArithmeticError, AssertionError, LookupError, ValueError, ImportError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(
                f"{config.model / 'config.json'} describes no model that can be built ({reason})"
            ) from error
        # Shapes can be had without the numbers that quantizing reads.
        shape = {name: value for name, value in (config.lora or {}).items() if name != "quantize"}
        put_trained(model, {}, lora=shape, adapt="lora" in stage.parts)
    return model


def trained_groups(model: "ValleyForConditionalGeneration", stage: StageConfig) -> tuple[ParameterGroup, ...]:
    """Mark what `stage` trains; raises ConfigError where the model does not have it."""
    return prepare_stage(model.core, stage, tower=model.vision_tower)


def forecast_stage(model_config: "ValleyConfig", config: TrainConfig, stage: StageConfig) -> StageForecast:
    """What `stage` trains, part by part. Raises as `meta_model` and `trained_groups`."""
    model = meta_model(model_config, config, stage)
    found: dict[tuple[str, float], int] = {}
    for group in trained_groups(model, stage):
        for name, parameter in zip(group.names, group.parameters, strict=True):
            part = _part_of(model, name, parameter, stage)
            count = _num_new_rows(model) * parameter.shape[1] if part == "new_embeddings" else parameter.numel()
            key = (part, group.learning_rate)
            found[key] = found.get(key, 0) + count
    num_core, num_tower = (sum(p.numel() for p in part.parameters()) for part in (model.core, model.vision_tower))
    trains_tower = "tower" in stage.parts
    quantizes = "lora" in stage.parts and (config.lora or {}).get("quantize") is not None
    under_adapter = (p.numel() for name, p in model.core.named_parameters() if name.endswith(".base_layer.weight"))
    return StageForecast(
        name=stage.name,
        parts=tuple(TrainedPart(part, count, rate) for (part, rate), count in found.items()),
        num_module=num_core + num_tower * trains_tower,
        num_quantized=sum(under_adapter) if quantizes else 0,
        num_outside=num_tower * (not trains_tower),
    )


def forecast_memory(
    forecast: StageForecast, config: TrainConfig, *, zero_stage: int, offload: bool, activations: int = 0
) -> Memory:
    """Bytes of one worker of `config.min_workers`, by the formula of docs/training.md:

    weights      w P             (ZeRO 3: / W, and up to 10^9 gathered)       w = 4 in fp32, else 2
    gradients    4 T             (ZeRO 2, 3: / W) + 2 T in half precision on ZeRO 0 and 1
    optimizer    (8 + m) T       (ZeRO 1, 2, 3: / W; offload: on the host)    m = 4 unless fp32 on ZeRO 0
    buckets      4 min(T, 5e8)   (ZeRO 1, 2, 3; twice with a GPU)
    tower        4 bytes per parameter of a frozen one
    """
    world, half = config.min_workers, config.precision != "fp32"
    zero_stage = max(zero_stage, 1) if half else zero_stage  # as train/zero.py runs it
    module, trained = forecast.num_module - forecast.num_quantized, forecast.num_trained
    width = 2 if half else 4
    share = {stage: world if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    gradients = 4 * trained // share[2] + (2 * trained if half and zero_stage < 2 else 0)
    optimizer = (8 + (4 if half or zero_stage else 0)) * trained // share[1]
    return Memory(
        weights=width * module // share[3]
        + (width * min(module, MAX_LIVE) if zero_stage == 3 and world > 1 else 0)
        + int(QUANTIZED_BYTES * forecast.num_quantized),
        gradients=gradients,
        optimizer=0 if offload else optimizer,
        buckets=(4 * min(trained, MAX_BUCKET) * (2 if config.use_gpu else 1)) if zero_stage else 0,
        tower=4 * forecast.num_outside,
        activations=activations,
        host=optimizer + 4 * trained // share[2] if offload else 0,
    )


def activation_bytes(model_config: "ValleyConfig", config: TrainConfig, *, num_tokens: int) -> int:
    """Bytes that a micro-batch of N = `num_tokens` tokens, padding included, keeps for the backward pass.

    a N (L (10 D + 4 I) + 2 D) + 12 N V, with a = 4 in fp32 and else 2: what a LLaMA block keeps, and the logits in
    float32 with their gradient, as if every token had a label. With gradient checkpointing a N (L D + 10 D + 4 I):
    one row per layer, and one layer again.
    """
    text: Any = model_config.text_config
    size = 4 if config.precision == "fp32" else 2
    width = int(text.hidden_size)
    layer = 10 * width + 4 * int(getattr(text, "intermediate_size", 4 * width))
    layers = int(text.num_hidden_layers)
    kept = layers * width + layer if config.gradient_checkpointing else layers * layer + 2 * width
    return num_tokens * (size * kept + 12 * int(text.vocab_size))


def _part_of(model: "ValleyForConditionalGeneration", name: str, parameter: Any, stage: StageConfig) -> str:
    if name.startswith("vision_tower."):
        return "tower"
    return next(part for part in holders(model.core, name, parameter) if part in stage.parts)


def _num_new_rows(model: "ValleyForConditionalGeneration") -> int:
    return 6 + (model.config.pad_token_id is not None)
