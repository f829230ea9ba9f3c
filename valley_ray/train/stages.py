"""What a stage trains: parts (named in a configuration) → parameters, with learning rates and weight decay."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from valley_ray.errors import ConfigError
from valley_ray.model import ValleyCore
from valley_ray.model.vision import extract_features
from valley_ray.train.stage_config import Part, StageConfig

TOWER_PREFIX = "vision_tower."
"""In front of the names of a trained tower's parameters; all others are named as in the core."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float


def prepare_stage(core: ValleyCore, stage: StageConfig, *, tower: Any = None) -> tuple[ParameterGroup, ...]:
    """Mark what `stage` trains in `core` (`requires_grad`) and in its vision `tower`; return it as optimizer groups.

    Names are those in the core, and `vision_tower.` in front of those in the tower.

    Raises:
        ConfigError: a part that the stage names has no parameters in this model.
    """
    named = dict(core.named_parameters())
    parts = {name: holders(core, name, parameter) for name, parameter in named.items()}
    if tower is not None:
        tower.requires_grad_(False)
        if "tower" in stage.parts:
            of_tower = {f"{TOWER_PREFIX}{name}": parameter for name, parameter in _used_by_features(core, tower)}
            named |= of_tower
            parts |= dict.fromkeys(of_tower, ("tower",))
    _check_parts(stage, {part for held_by in parts.values() for part in held_by})
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named.items():
        part = next((part for part in parts[name] if part in stage.parts), None)
        parameter.requires_grad_(part is not None)
        if part is None:
            continue
        decay = 0.0 if parameter.ndim < 2 or part == "new_embeddings" else stage.weight_decay
        if part == "new_embeddings":
            _train_rows(parameter, _new_token_ids(core))
        rate = stage.learning_rates.get(part, stage.learning_rate)
        groups.setdefault((rate, decay), []).append((name, parameter))
    return tuple(
        ParameterGroup(tuple(n for n, _ in members), tuple(p for _, p in members), rate, decay)
        for (rate, decay), members in groups.items()
    )


def holders(core: ValleyCore, name: str, parameter: nn.Parameter) -> tuple[Part, ...]:
    """The parts that parameter `name` of `core` belongs to, the narrowest first.

    A head that shares the input embedding's table belongs to the embedding's parts.
    """
    if name.startswith("mm_projector."):
        return ("projector",)
    if name.startswith("pooling."):
        return ("temporal",)
    if ".lora_" in name:
        return ("lora",)
    if parameter is core.language_model.get_input_embeddings().weight:
        return ("embeddings", "language_model", "new_embeddings")
    if parameter is core.language_model.get_output_embeddings().weight:
        return ("lm_head", "language_model")
    return ("layers", "language_model")


def learning_rate_scale(step: int, num_steps: int, stage: StageConfig) -> float:
    """Share of the peak learning rate at `step` (0-based) of `num_steps`: linear warm-up whose first step is not
    zero, then constant or a cosine that reaches zero after the last step."""
    warmup = math.ceil(stage.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if stage.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _check_parts(stage: StageConfig, available: set[Part]) -> None:
    """A pooling without weights is what presets allow for; whoever writes `temporal` out expects some."""
    missing = stage.parts - available
    if "temporal" not in stage.trainable:
        missing -= {"temporal"}
    if missing:
        raise ConfigError(
            f"stage {stage.name} trains {', '.join(sorted(missing))}, which this model does not have; leave it out"
        )


def _used_by_features(core: ValleyCore, tower: Any) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the features depend on: layers behind the one they are taken from get no gradient, and an
    optimizer would still decay them."""
    named = [(name, parameter) for name, parameter in tower.named_parameters()]
    tower.requires_grad_(True)
    side, weight = core.config.image_size, named[0][1]
    pixels = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
    features = extract_features(tower, pixels, layer=core.config.vision_layer, num_patches=core.config.num_patches)
    gradients = torch.autograd.grad(features.sum(), [parameter for _, parameter in named], allow_unused=True)
    tower.requires_grad_(False)
    return [pair for pair, gradient in zip(named, gradients, strict=True) if gradient is not None]


def _new_token_ids(core: ValleyCore) -> list[int]:
    config = core.config
    ids = [
        *(config.vi_frame_token_id, config.vi_start_token_id, config.vi_end_token_id),
        *(config.im_patch_token_id, config.im_start_token_id, config.im_end_token_id),
    ]
    return ids if config.pad_token_id is None else [*ids, config.pad_token_id]


def _train_rows(weight: nn.Parameter, rows: list[int]) -> None:
    """Let gradients through to `rows` of an embedding alone."""
    mask = torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    mask[rows] = 1.0
    weight.register_hook(lambda gradient: gradient * mask.to(gradient.dtype))
