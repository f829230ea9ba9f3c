"""The vision tower that an upstream checkpoint names: its shape and its image settings, wherever they can be learnt.

The tower's weights are in the checkpoint itself, so only its configuration is looked for. P patches, Dv tower width.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, ChineseCLIPVisionConfig, CLIPVisionConfig, PreTrainedConfig

from valley_ray.errors import CheckpointError
from valley_ray.model.folders import base_folder, find_beside, find_in_hub_cache, read_json
from valley_ray.model.weight_files import find_files, read_weights

logger = logging.getLogger(__name__)

WEIGHTS_PREFIX = "model.vision_tower.vision_model."
"""In front of the tower's weights in an upstream checkpoint."""

CHINESE = "chinese"
"""In a tower's name, upstream takes it for a ChineseCLIP (valley/model/valley.py)."""

HEAD_WIDTH = 64
"""Width of an attention head in every released CLIP."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
KNOWN_TOWERS: dict[str, dict[str, int]] = {
    "openai/clip-vit-base-patch32": {**_BASE, "patch_size": 32, "image_size": 224, "projection_dim": 512},
    "openai/clip-vit-base-patch16": {**_BASE, "patch_size": 16, "image_size": 224, "projection_dim": 512},
    "openai/clip-vit-large-patch14": {**_LARGE, "patch_size": 14, "image_size": 224, "projection_dim": 768},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "patch_size": 14, "image_size": 336, "projection_dim": 768},
    "OFA-Sys/chinese-clip-vit-base-patch16": {**_BASE, "patch_size": 16, "image_size": 224, "projection_dim": 512},
    "OFA-Sys/chinese-clip-vit-large-patch14": {**_LARGE, "patch_size": 14, "image_size": 224, "projection_dim": 768},
    "OFA-Sys/chinese-clip-vit-large-patch14-336px": {
        **_LARGE,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    },
}
"""Published shapes of the towers that released checkpoints name."""


@dataclass(frozen=True)
class ReleasedTower:
    """What an upstream checkpoint's tower is."""

    name: str
    """As config.json says it in `mm_vision_tower`."""
    config: PreTrainedConfig
    """Of the vision half."""
    preprocessor: dict[str, Any] | None
    """Its preprocessor_config.json; None where only the tower's shape is known."""


def read_tower(folder: Path) -> ReleasedTower:
    """The tower of an upstream model folder (of its base, for a bare adapter folder).

    Looked for in this order: a folder of its name under the working directory, under `folder` and its parents; the
    facts of well-known names; the hub's cache on this disk; the shapes of the weights.

    Raises:
        CheckpointError: config.json names no tower, or its shape cannot be told from the weights.
    """
    if not (folder / "config.json").is_file():
        base = base_folder(folder)
        if base is not None and (base / "config.json").is_file():
            return read_tower(base)
    name = read_json(folder / "config.json").get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.json'}: expected a tower's name under mm_vision_tower, got {name!r}")
    found = find_beside(name, folder)
    if found is not None and (found / "config.json").is_file():
        return _of_folder(name, found)
    if name in KNOWN_TOWERS:
        return ReleasedTower(name, _config_class(name)(**KNOWN_TOWERS[name]), _known_preprocessor(name))
    cached = find_in_hub_cache(name)
    if cached is not None:
        return _of_folder(name, cached)
    return ReleasedTower(name, _config_of_weights(name, folder), None)


def _of_folder(name: str, folder: Path) -> ReleasedTower:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} of the vision tower cannot be used ({reason})") from error
    path = folder / "preprocessor_config.json"
    return ReleasedTower(name, getattr(config, "vision_config", config), read_json(path) if path.is_file() else None)


def _config_class(name: str) -> Any:
    return ChineseCLIPVisionConfig if CHINESE in name else CLIPVisionConfig


def _known_preprocessor(name: str) -> dict[str, Any]:
    """Image settings as published with the known towers: ChineseCLIP stretches, CLIP crops."""
    side = KNOWN_TOWERS[name]["image_size"]
    square = {"height": side, "width": side}
    is_chinese = CHINESE in name
    return {
        "do_resize": True,
        "size": square if is_chinese else {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": not is_chinese,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def _config_of_weights(name: str, folder: Path) -> PreTrainedConfig:
    """Shape of the tower told by its own weights; the number of heads is not in them, so released CLIPs' is taken."""
    state = read_weights(find_files(folder))
    weights = {key.removeprefix(WEIGHTS_PREFIX): value for key, value in state.items() if WEIGHTS_PREFIX in key}
    patch = _tower_weight(weights, "embeddings.patch_embedding.weight", folder)
    positions = _tower_weight(weights, "embeddings.position_embedding.weight", folder)
    mlp = _tower_weight(weights, "encoder.layers.0.mlp.fc1.weight", folder)
    width, _, patch_size, _ = patch.shape
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"{folder}: the vision tower {name!r} is out of reach, and the weights' width of {width} is no multiple of "
            f"{HEAD_WIDTH}, so the number of heads is unknown; put the tower's folder beside the checkpoint"
        )
    logger.warning(
        "the vision tower %r is out of reach: its shape is taken from the weights of %s, with %s per attention head",
        name,
        folder,
        HEAD_WIDTH,
    )
    config: PreTrainedConfig = _config_class(name)(
        hidden_size=width,
        intermediate_size=mlp.shape[0],
        num_hidden_layers=len({key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch_size,
        image_size=math.isqrt(positions.shape[0] - 1) * patch_size,
    )
    return config


def _tower_weight(weights: dict[str, torch.Tensor], name: str, folder: Path) -> torch.Tensor:
    if name not in weights:
        raise CheckpointError(
            f"{folder}: the vision tower is out of reach and the weights lack {WEIGHTS_PREFIX}{name}; "
            "put the tower's folder beside the checkpoint"
        )
    return weights[name]
