"""Vision towers: pixel values → features with the frame token first.

Any Hugging Face vision tower that returns hidden states of patch tokens serves. N frames, P patches, Dv tower width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from valley_ray.errors import CheckpointError


def build_tower(config: PreTrainedConfig) -> nn.Module:
    """A tower of the shape that `config` says, with random weights."""
    tower: nn.Module = AutoModel.from_config(config)
    return tower


def vision_half(model: nn.Module) -> nn.Module:
    """The tower inside a two-sided model (CLIPModel, ChineseCLIPModel, SiglipModel); any other model as it is."""
    half = getattr(model, "vision_model", None)
    return half if half is not None and hasattr(model, "text_model") else model


def tower_width(config: Any) -> int:
    """Dv."""
    return int(config.hidden_size)


def extract_features(tower: nn.Module, pixel_values: torch.Tensor, *, layer: int, num_patches: int) -> torch.Tensor:
    """Hidden state `layer` of the tower as [N, 1 + P, Dv], frame token first; no norm is applied to it.

    `pixel_values` is float [N, 3, S, S]. The frame token is the tower's own first token (CLS) where it has one beside
    the patches, else the mean over the patches. Register tokens between CLS and patches are left out.

    Raises:
        CheckpointError: the tower gives fewer tokens than `num_patches`.
    """
    hidden: torch.Tensor = tower(pixel_values, output_hidden_states=True).hidden_states[layer]
    num_extra = hidden.shape[1] - num_patches
    if num_extra < 0:
        raise CheckpointError(
            f"the vision tower gives {hidden.shape[1]} tokens per frame but its image_size and patch_size say "
            f"{num_patches} patches; use a tower that keeps one token per patch"
        )
    if num_extra == 1:
        return hidden
    patches = hidden[:, num_extra:]
    frame_token = hidden[:, :1] if num_extra else patches.mean(dim=1, keepdim=True)
    return torch.cat([frame_token, patches], dim=1)
