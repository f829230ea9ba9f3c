"""What a stage's engine wraps: the core, or tower and core together where the tower is trained too."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.vision import check_pixels, extract_features
from valley_ray.train.config import TrainConfig
from valley_ray.train.stage_config import StageConfig

INPUT_PARTS = frozenset({"tower", "projector", "embeddings", "new_embeddings", "language_model"})
"""Parts by which the first decoder block's input has a gradient on every batch."""


class TowerAndCore(nn.Module):
    """A model whose tower is trained: pixels instead of features in, gradients back into the tower."""

    def __init__(self, model: ValleyForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower: Any = model.vision_tower
        self.core = model.core

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: Sequence[torch.Tensor] = (),
        **inputs: Any,
    ) -> Any:
        """As `ValleyCore.forward`, with `pixel_values` ([T, 3, S, S] per visual block) for features.

        A batch without media sends a black frame through the tower and on through projector and pooling, with weight
        zero: every rank gathers the same weights in the same order and has a gradient for each.
        """
        config, dtype = self.core.config, self.vision_tower.dtype
        for clip in pixel_values:
            check_pixels(clip, image_size=config.image_size, tower_dtype=dtype)
        side = config.image_size
        frames = torch.cat(list(pixel_values)) if pixel_values else torch.zeros(1, 3, side, side)
        features = extract_features(
            self.vision_tower,
            frames.to(input_ids.device, dtype),
            layer=config.vision_layer,
            num_patches=config.num_patches,
        )
        if not pixel_values:
            return self.core(input_ids, attention_mask, blank=features, **inputs)
        clips = features.split([len(clip) for clip in pixel_values])
        return self.core(input_ids, attention_mask, clips, **inputs)


def trainable_module(model: ValleyForConditionalGeneration, stage: StageConfig, config: TrainConfig) -> nn.Module:
    """The part of `model` that the engine of `stage` wraps, in training mode; the rest of it stays in evaluation mode.

    With `config.gradient_checkpointing` the language model (and a trained tower) keep no activations.
    """
    trains_tower = "tower" in stage.parts
    model.vision_tower.train(trains_tower)
    model.core.train()
    if config.gradient_checkpointing:
        # The reentrant kind gives a trained tower wrong gradients under ZeRO-3.
        options = {"use_reentrant": False}
        for part in (model.core.language_model, *((model.vision_tower,) if trains_tower else ())):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if config.zero_stage == 3 and stage.parts & INPUT_PARTS:
        _gather_whole_blocks(model.core.language_model)
    return TowerAndCore(model) if trains_tower else model.core


def _gather_whole_blocks(language_model: nn.Module) -> None:
    """Let ZeRO-3 gather decoder blocks as one, not each weight in them.

    It wraps the inputs of everything it gathers, so that gradients of activations are summed in another order than by
    plain torch: in bf16, of an adapter, that is another training. A block whose input has no gradient cannot be
    gathered so: DeepSpeed would take its gradients before they are there.
    """
    from deepspeed.utils import set_z3_leaf_modules  # seconds of import that only a training process should pay

    set_z3_leaf_modules(language_model, [GradientCheckpointingLayer])
