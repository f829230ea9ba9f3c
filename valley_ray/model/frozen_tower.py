"""The vision tower of a model folder without its language model, and a name for what it makes of frames."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from valley_ray.model.checkpoint import load_folder
from valley_ray.model.config import ValleyConfig
from valley_ray.model.vision import build_tower, encode_frames

KEY_VERSION = "1"
"""Raised where the same tower gives other features than before."""

SHAPING = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")
"""Settings of a tower that its weights do not show."""


class FrozenTower(PreTrainedModel):
    """The tower alone: what a stage needs that makes features and no answers."""

    config_class = ValleyConfig
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = (r"^core\.",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ValleyConfig) -> None:
        super().__init__(config)
        self.vision_tower: Any = build_tower(config.vision_config)
        self.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open the tower of a model folder of any layout, in float32 as training does; the rest is not read.

        Raises:
            CheckpointError: no such folder, a damaged file, or a missing, unexpected or odd-shaped weight.
        """
        load = partial(super().from_pretrained, **({"dtype": torch.float32} | kwargs))
        model: Self = load_folder(load, Path(pretrained_model_name_or_path))
        model.requires_grad_(False)
        return model

    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `ValleyForConditionalGeneration.encode_frames`: [N, 3, S, S] → [N, 1 + P, Dv]."""
        return encode_frames(self.vision_tower, pixel_values, self.config)


def tower_key(
    tower: nn.Module, config: Any, *, image_mean: tuple[float, float, float], image_std: tuple[float, float, float]
) -> str:
    """Hex digest of all that makes features of frames: weights as they compute, their settings, layer and colours.

    The same weights in another file, layout or number format on disk give the same key.
    """
    settings = {name: getattr(config.vision_config, name, None) for name in SHAPING}
    settings |= {"version": KEY_VERSION, "layer": config.vision_layer, "mean": image_mean, "std": image_std}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
