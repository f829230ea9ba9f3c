"""Vision towers: pixel values → features with the frame token first.

Any Hugging Face vision tower that returns hidden states of patch tokens serves. N frames, P patches, Dv tower width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from valley_ray.errors import CheckpointError, MediaError


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


def check_pixels(pixel_values: torch.Tensor, *, image_size: int, tower_dtype: torch.dtype) -> None:
    """Refuse pixels that are not float [T, 3, S, S], or of a coarser dtype than the tower's; finer ones are cast down.

    Coarse pixels in a fine tower are refused because the loss has happened already and nothing else would tell.

    Raises:
        MediaError: naming shape or dtype and what to give instead.
    """
    expected = (3, image_size, image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected or not len(pixel_values):
        raise MediaError(
            f"expected pixel values [T, {', '.join(map(str, expected))}] with T frames (1 for an image), got "
            f"{list(pixel_values.shape)}; leave rows without media out"
        )
    dtype = pixel_values.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).eps > torch.finfo(tower_dtype).eps:
        raise MediaError(
            f"pixel values are {dtype} but the tower computes in {tower_dtype}; give float32 pixel values, as the "
            f"processor makes them, or open the model with dtype={dtype}"
        )


@torch.no_grad()
def encode_frames(tower: Any, pixel_values: torch.Tensor, config: Any) -> torch.Tensor:
    """Features [N, 1 + P, Dv] of float `pixel_values` [N, 3, S, S] by the tower of a ValleyConfig; no gradient.

    Raises:
        MediaError: pixels of another shape, or rounded more coarsely than the tower computes.
    """
    check_pixels(pixel_values, image_size=config.image_size, tower_dtype=tower.dtype)
    tower.eval()
    pixel_values = pixel_values.to(tower.dtype)
    return extract_features(tower, pixel_values, layer=config.vision_layer, num_patches=config.num_patches)


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
